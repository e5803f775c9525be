"""vLLM as a child process: what crosses the pipe, and that its greedy tokens are ours."""

import os
import signal
import sys
from collections.abc import Iterator
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
from farm.config import TargetSpec, UserError
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.target import zoo
from farm.target.load import load_target
from tests.farm.models import tiny_model

SETTINGS = VllmSettings("a-model", "float32", 64, 2, False)
ECHO = """
import json, sys
print("noise of a library", file=sys.stderr)
print(json.dumps({"ready": json.loads(sys.stdin.readline())}), flush=True)
for line in sys.stdin:
    task = json.loads(line)
    print(json.dumps({"tokens": [[n] * n for n in task["num_new"]], "seconds": task["slots"]}), flush=True)
"""
BROKEN = "import sys; sys.stdin.readline(); raise RuntimeError('no such architecture')"


def state(pid: int) -> str:
    """R, S, T (stopped) and so on, as the kernel names it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmEngine]:
    """The engine's own end of the pipe, with a script that knows the protocol behind it."""
    script = tmp_path / "child.py"
    script.write_text(ECHO)
    monkeypatch.setattr(vllm_engine, "CHILD", script)
    engine = VllmEngine(SETTINGS, 1, Path(sys.executable))
    yield engine
    engine.close()


def test_the_child_answers_and_is_stopped_between_questions(child: VllmEngine) -> None:
    pid = child._child.pid
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    assert state(pid) == "T"
    assert child.generate([(1, 2), (3,)], [2, 1], 5) == ([[2, 2], [1]], 5)
    assert child.generate([(1,)], [3], 7) == ([[3, 3, 3]], 7)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)
    assert state(pid) == "T"
    child.close()
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, signal.SIGCONT)


def test_a_child_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "child.py"
    script.write_text(BROKEN)
    monkeypatch.setattr(vllm_engine, "CHILD", script)
    with pytest.raises(UserError, match=r"a-model: vLLM failed in float32: .*no such architecture"):
        VllmEngine(SETTINGS, 1, Path(sys.executable))


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
            tokens, seconds = engine.generate(prompts, num_new, 2)
            assert tokens == [list(one.tokens) for one in ours]
            assert seconds > 0
