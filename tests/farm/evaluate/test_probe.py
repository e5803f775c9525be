"""What a probe says of time: decoding, which a draft shortens, apart from prefills, which none does."""

import time
from pathlib import Path
from types import SimpleNamespace

from farm.data.prompts import load_prompts
from farm.decode.runner import Prefilled, Runner
from farm.decode.scheduler import Prefill
from farm.evaluate import bench
from farm.evaluate.probe import probe
from farm.sections import EvaluateSettings, ProbeSettings
from tests.farm.fleet.family import Family

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
