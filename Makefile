# make demo   build .venv, then train a small family and onboard it
# make test   build .venv, check and run the tests
# make test-slow   the tests that take more than a minute each, mostly whole onboardings
# make test-browser   the playground in the system's chromium
# make vllm-venv   build .vllm-venv, which `farm bench decode --engine vllm` compares with
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
VLLM := .vllm-venv
# Options for finding torch. The project runs on a CPU: with an index that has only CUDA builds under the plain
# version, name PyTorch's CPU index here, for instance TORCH_OPTIONS='--index-url URL'.
TORCH_OPTIONS ?=

.PHONY: setup demo test test-slow test-browser test-vllm check vllm-venv
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)

setup: $(STAMP)

# torch goes first, so that nothing after it can choose another build of it
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_OPTIONS) torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/farm demo

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	RAY_AUTH_MODE=disabled OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

test-slow: setup
	RAY_AUTH_MODE=disabled OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# playwright drives a browser that is there already; its own download is not needed
test-browser: setup
ifeq ($(CHROMIUM),)
	@echo "test-browser: no chromium here (Debian: apt install chromium; or CHROMIUM=/path/to/it); nothing was tested"
else
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,browser]'
	RAY_AUTH_MODE=disabled OMP_NUM_THREADS=1 CHROMIUM=$(CHROMIUM) $(BIN)/python -m pytest -m browser
endif

# a target of the demo's zoo, its draft exported, in vLLM and here; makes the zoo if there is none
test-vllm: setup vllm-venv
	test -f .farm/store/registry/math/live.json || $(BIN)/farm demo
	RAY_AUTH_MODE=disabled $(BIN)/python -m pytest -m vllm

# its own environment: vLLM's versions of these libraries are not this project's
vllm-venv: $(VLLM)/.ready

$(VLLM)/.ready: vllm-requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet $(TORCH_OPTIONS) torch==2.13.0
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r vllm-requirements.txt
	touch $(VLLM)/.ready
