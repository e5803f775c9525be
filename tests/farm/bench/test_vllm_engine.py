"""vLLM as a child process: what crosses the pipe, and that its greedy tokens are ours."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig

from farm.bench import vllm_engine
from farm.bench.vllm_engine import (
    VllmEngine,
    VllmSettings,
    check_loadable,
    environment,
    find_python,
    kv_bytes,
    vllm_engines,
)
from farm.config import UserError
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.sections import TargetSpec
from farm.target import zoo
from farm.target.load import load_target
from tests.farm.models import tiny_model

SETTINGS = VllmSettings("a-model", "float32", 64, 2)
# In the place of vLLM: a request's every token is the number of requests that were live in that step.
STUB = """
import types

class SamplingParams:
    def __init__(self, temperature, max_tokens, ignore_eos, detokenize):
        assert temperature == 0 and ignore_eos
        self.left = max_tokens

class Request:
    def __init__(self, request_id, params):
        self.request_id, self.params, self.token_ids, self.outputs = request_id, params, [], [self]

    @property
    def finished(self):
        return self.params.left == 0

class LLM:
    def __init__(self, model, **options):
        print("noise of a library")
        if model == "broken":
            raise RuntimeError("no such architecture")
        self.llm_engine, self.live, self.steps = self, [], 0
        assert options["disable_log_stats"] != (options["speculative_config"] is not None)

    def get_metrics(self):
        count = lambda name, value: types.SimpleNamespace(name=f"vllm:spec_decode_num_{name}", value=value)
        # counters go on over all runs of an engine; the last is none of those that are asked for
        return [count("drafts", 10 * self.steps), count("accepted_tokens", 15 * self.steps), count("other", -1)]

    def add_request(self, request_id, prompt, params):
        assert prompt["prompt_token_ids"]
        self.live.append(Request(request_id, params))

    def step(self):
        self.steps += 1
        for request in self.live:
            request.token_ids.append(len(self.live))
            request.params.left -= 1
        done = self.live
        self.live = [request for request in done if not request.finished]
        return done
"""
PARENT = """
import os, sys
from pathlib import Path
from farm.bench import vllm_engine
vllm_engine.environment = lambda *_: {}
settings = vllm_engine.VllmSettings("a-model", "float32", 64, 2)
engine = vllm_engine.VllmEngine(settings, 1, Path(sys.executable))
print(engine._child.pid, flush=True)
os._exit(0)
"""


def becomes(pid: int, *states: str) -> bool:
    """Whether a process gets into one of the kernel's states (T stopped, Z ended) within ten seconds."""
    for _ in range(200):
        try:
            now = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            now = "Z"
        if now in states:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a `vllm` that the child finds instead of the real one."""
    (tmp_path / "vllm.py").write_text(STUB)
    monkeypatch.setattr(vllm_engine, "environment", lambda *_: {"PYTHONPATH": str(tmp_path)})
    return tmp_path


def test_the_child_answers_and_is_stopped_between_questions(stub: Path) -> None:
    engine = VllmEngine(SETTINGS, 1, Path(sys.executable))
    pid = engine._child.pid
    for prompts, num_new, slots, expected in (
        ([(1, 2), (3,), (4,)], [2, 1, 2], 3, [[3, 2], [3], [3, 2]]),
        ([(1, 2), (3,), (4,)], [2, 1, 2], 1, [[1, 1], [1], [1, 1]]),
        ([(1,), (1,), (1,), (1,)], [1, 3, 1, 1], 2, [[2], [2, 2, 2], [2], [2]]),
    ):
        assert becomes(pid, "T")
        answer = engine.generate(prompts, num_new, slots)
        assert answer.tokens == expected
        assert answer.seconds > 0
        assert (answer.drafts, answer.accepted) == (0, 0), "nothing is counted unless it was asked for"
    engine.close()
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, signal.SIGCONT)


def test_an_answer_carries_the_counts_of_its_own_run_alone(stub: Path) -> None:
    speculative = {"method": "eagle", "model": "a-draft", "num_speculative_tokens": 2}
    engine = VllmEngine(replace(SETTINGS, speculative=speculative, counts=True), 1, Path(sys.executable))
    try:
        for steps in (3, 1):
            answer = engine.generate([(1,)], [steps], 1)
            assert (answer.drafts, answer.accepted) == (10 * steps, 15 * steps)
            assert answer.tau == 2.5
    finally:
        engine.close()
    assert math.isnan(replace(answer, drafts=0, accepted=0).tau)


def test_a_child_that_fails_says_why(stub: Path) -> None:
    with pytest.raises(UserError, match=r"broken: vLLM failed in float32: .*no such architecture"):
        VllmEngine(replace(SETTINGS, model="broken"), 1, Path(sys.executable))


def test_a_stopped_child_ends_with_its_parent(stub: Path) -> None:
    folders = os.pathsep.join([str(stub), str(Path(__file__).parents[3])])
    done = subprocess.run(
        [sys.executable, "-c", PARENT],
        env=os.environ | {"PYTHONPATH": folders},
        capture_output=True,
        text=True,
    )
    pid = int(done.stdout)
    try:
        assert becomes(pid, "Z")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_missing_environment_names_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make vllm-venv"):
        find_python(tmp_path / ".vllm-venv")


def test_what_vllm_cannot_open_is_refused_by_name(tmp_path: Path) -> None:
    prompts = "prompts.jsonl"
    for spec in (
        TargetSpec(name="quantized", model=str(tmp_path / "model.gguf"), prompts=prompts),
        TargetSpec(name="adapter", model=str(tmp_path), lora=str(tmp_path), prompts=prompts),
    ):
        with pytest.raises(UserError, match=f"{spec.name}: vLLM"):
            check_loadable(spec)
    check_loadable(TargetSpec(name="whole", model=str(tmp_path), prompts=prompts))


def test_the_cache_is_asked_for_in_whole_gib_and_holds_every_request() -> None:
    config = AutoConfig.for_model("llama", num_hidden_layers=30, num_key_value_heads=3, head_dim=64)
    exact = 30 * 2 * 3 * 64 * 4 * 16 * 4096
    assert exact < kv_bytes(config, 16 * 4096) < 2 * exact
    assert environment(Path("bin/python"), 1)["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert environment(Path("bin/python"), 5 * 2**30 // 2)["VLLM_CPU_KVCACHE_SPACE"] == "3"


@pytest.mark.vllm
def test_both_engines_of_vllm_decode_the_tokens_that_ours_decodes(tmp_path: Path) -> None:
    """float32 both, ragged lengths, fewer slots than requests."""
    zoo.save(tiny_model(vocab=1024, hidden=128, head_dim=32), zoo.train_tokenizer(), tmp_path)
    spec = TargetSpec(name="tiny", model=str(tmp_path), prompts="prompts.jsonl")
    target = load_target(spec)
    prompts = [tuple(range(1 + i, 6 + 3 * i)) for i in range(5)]
    num_new = [16, 5, 24, 1, 9]
    requests = [
        Request(str(i), ids, SamplingParams(max_new_tokens=new))
        for i, (ids, new) in enumerate(zip(prompts, num_new, strict=True))
    ]
    route = Route(target.forward, frozenset())
    ours = Engine([route], num_slots=2, max_length=64, k=0).run(requests)
    with vllm_engines(spec, target.config, (64, 4), prompts[0], dtypes=("float32",)) as engines:
        for engine in engines.values():
            answer = engine.generate(prompts, num_new, 2)
            assert answer.tokens == [list(one.tokens) for one in ours]
            assert answer.seconds > 0
