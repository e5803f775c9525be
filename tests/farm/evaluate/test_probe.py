"""What a probe says of time: decoding, which a draft shortens, apart from prefills; what a check takes of memory."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import GemmaConfig, GemmaForCausalLM

from farm.data.prompts import load_prompts
from farm.decode.runner import Prefilled, Runner
from farm.decode.scheduler import Prefill
from farm.evaluate import bench
from farm.evaluate.probe import check_target, probe
from farm.evaluate.target import EvaluateTask, evaluate_target
from farm.sections import EvaluateSettings, ProbeSettings, TargetSpec
from farm.target import zoo
from farm.target.load import load_target
from tests.farm.decode.family import write_lora
from tests.farm.fleet.family import Family
from tests.farm.models import tiny_model

SLOW_S = 100.0  # of a prefill, by a clock that nobody waits for


def test_the_seconds_of_a_round_have_no_prefill_in_them(tmp_path: Path, monkeypatch) -> None:
    fast, late_s = Runner.prefill, 0.0

    def slow(self: Runner, prefill: Prefill) -> Prefilled:
        nonlocal late_s
        late_s += SLOW_S
        self.seconds.prefill += SLOW_S
        return fast(self, prefill)

    monkeypatch.setattr(Runner, "prefill", slow)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late_s))
    family = Family(tmp_path)
    target = family.target("alpha")
    found = probe(
        target, family.trunk, load_prompts(target.prompts).prompts,
        ProbeSettings(prompts=4, max_new_tokens=8), EvaluateSettings(k=2), "float32", timed_slots=4,
    )  # fmt: skip
    assert found.prefill_s >= SLOW_S / (4 * 8)  # one prefill of four prompts at least
    assert 0 < found.plain_s < 1
    assert 0 < found.round_s < 1


def test_a_probe_measures_as_the_evaluation_does_whose_tau_it_is_compared_with(tmp_path: Path) -> None:
    """Retention is a ratio of both: of a greedy tau, every target that is served at temperature 1 would keep less."""
    family = Family(tmp_path)
    target = family.target("alpha")
    prompts = load_prompts(target.prompts).prompts[:4]
    settings = EvaluateSettings(k=2, temperatures=(1.0,), max_new_tokens=32, speed_prompts=1, threads=1)
    found = probe(
        target, family.trunk, prompts, ProbeSettings(prompts=4, max_new_tokens=32), settings, "float32"
    )
    task = EvaluateTask(target, settings, str(family.trunk), None, None, prompts, "float32")
    assert found.tau == evaluate_target(task)["tau_base_draft"]


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that were alive at a time while it ran, those of mapped files among them."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    alive = most = 0
    for event in sorted(seen.events(), key=lambda event: event.time_range.end):
        alive += event.self_cpu_memory_usage
        most = max(most, alive)
    return most


def saved(folder: Path, model: torch.nn.Module) -> TargetSpec:
    """A checkpoint of the model in bfloat16, in shards that hold one large tensor each."""
    folder.mkdir()
    zoo.save(model.bfloat16(), zoo.train_tokenizer(), folder)  # type: ignore[arg-type]
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="70KB")  # type: ignore[operator]
    assert (folder / "model.safetensors.index.json").is_file()
    return TargetSpec(name=folder.name, model=str(folder), prompts="")


@pytest.mark.parametrize("adapted", [False, True])
def test_a_check_has_a_few_tensors_in_memory_at_a_time(tmp_path: Path, adapted: bool) -> None:
    model = tiny_model(vocab=1024, layers=24)
    total = sum(4 * weight.numel() for weight in model.parameters())
    largest = max(4 * weight.numel() for weight in model.parameters())
    assert total > 10 * largest
    base = saved(tmp_path / "base", model)
    target = saved(tmp_path / "target", tiny_model(vocab=1024, layers=24, seed=1))
    factors = 0
    if adapted:
        lora = write_lora(tmp_path / "lora", tiny_model(vocab=1024, layers=24), rank=1, seed=0)
        target = target.model_copy(update={"lora": str(lora)})
        factors = (lora / "adapter_model.safetensors").stat().st_size
    assert peak_bytes(lambda: check_target(base, target)) < 3 * largest + 3 * factors


def test_a_check_has_one_model_in_memory_where_only_the_library_has_its_code(tmp_path: Path) -> None:
    config = GemmaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    base, target = (saved(tmp_path / name, GemmaForCausalLM(config)) for name in ("base", "target"))
    one = peak_bytes(lambda: load_target(base))
    assert peak_bytes(lambda: check_target(base, target)) < 1.2 * one
