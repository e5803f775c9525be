"""The parity gate: what it counts, when it is shut, and that vLLM passes it on a target of the zoo."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from farm.bench import parity
from farm.bench.parity import (
    NUM_PROMPTS,
    Parity,
    Subject,
    as_verified,
    decode_here,
    first_difference,
    fitting,
    measure_speeds,
    top_two_gap,
    verify,
)
from farm.bench.vllm_engine import VllmAnswer, VllmEngine, VllmSettings
from farm.cli.exporting import ZOO
from farm.cli.main import app
from farm.config import UserError
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.evaluate.target import OpenTrunk
from farm.export.engines import ServingEngine
from farm.export.folder import export
from farm.target.load import load_target
from tests.farm.export.drafts import Family, make_family

TOKENS = 12  # in the place of 128, where vLLM is not run
PAR = Parity("math", 4, "float32", 4.0, 4.0, None, 64, 0, (), 200.0, 100.0, 400.0)


@pytest.fixture(autouse=True)
def short_answers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("vllm") is None:
        monkeypatch.setattr(parity, "NEW_TOKENS", TOKENS)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), vocabulary=tuple(range(3, 90)))


@pytest.fixture(scope="module")
def subject(family: Family) -> Subject:
    prompts = tuple(tuple(range(i, i + 3 + i % 5)) for i in range(NUM_PROMPTS))
    return Subject(load_target(family.target), prompts, speed_prompts=2, speed_rounds=3)


class FakeVllm(VllmEngine):
    """Our own engine in the place of vLLM, over the draft that is given to it; `flips` spoils tokens."""

    made: list[FakeVllm] = []
    flips: dict[int, int] = {}

    def __init__(self, settings: VllmSettings, kv_bytes: int, python: Path) -> None:
        self.settings, self.closed = settings, False
        FakeVllm.made.append(self)

    def generate(self, prompts: Sequence[Sequence[int]], num_new: Sequence[int], slots: int) -> VllmAnswer:
        target, draft = OURS["target"], OURS["draft"]
        tokens, tau = decode_here(target, draft, [tuple(ids) for ids in prompts], 3)
        answers = [list(one) for one in tokens]
        for prompt, index in FakeVllm.flips.items():
            if prompt < len(answers):
                answers[prompt][index] += 1
        return VllmAnswer(answers, 0.5, 1000, round(1000 * (tau - 1)))

    def close(self) -> None:
        self.closed = True


OURS: dict[str, Any] = {}


@pytest.fixture
def vllm(family: Family, subject: Subject, monkeypatch: pytest.MonkeyPatch) -> type[FakeVllm]:
    opened = OpenTrunk.of(family.trunk_folder, subject.target)
    opened.trunk.vocabulary_C = None
    OURS.update(target=subject.target, draft=opened.draft(str(family.expert)))
    FakeVllm.made, FakeVllm.flips = [], {}
    monkeypatch.setattr(parity, "VllmEngine", FakeVllm)
    monkeypatch.setattr(parity, "find_python", lambda: Path("python"))
    return FakeVllm


def test_a_round_that_an_end_cuts_counts_as_a_whole_one_as_in_vllm(family: Family, subject: Subject) -> None:
    """Of far longer answers, the rounds that begin before the last token that counts."""
    draft = OpenTrunk.of(family.trunk_folder, subject.target).draft(str(family.expert))
    prompts, k = subject.prompts[:8], 3
    tokens, tau = decode_here(subject.target, draft, prompts, k)
    engine = Engine([Route(subject.target.forward, frozenset(), draft)], num_slots=8, max_length=200, k=k)
    for i, ids in enumerate(prompts):
        engine.add(Request(str(i), ids, SamplingParams(max_new_tokens=4 * TOKENS)))
    emitted, accepted = [0] * len(prompts), []
    while engine.has_work:
        for output in engine.step():
            row = int(output.request_id)
            if output.num_drafted is not None and emitted[row] < TOKENS:
                accepted.append(output.num_drafted)
            emitted[row] += len(output.tokens)
    assert [len(of_prompt) for of_prompt in tokens] == [TOKENS] * len(prompts)
    assert tau == 1 + sum(accepted) / len(accepted)


def test_tau_here_is_of_the_full_head_and_exceeds_the_cut_count(family: Family, subject: Subject) -> None:
    """The engine's own tau leaves out what lies behind a request's end; vLLM's counters do not."""
    opened = OpenTrunk.of(family.trunk_folder, subject.target)
    draft = opened.draft(str(family.expert))
    assert draft.trunk.vocabulary_C is not None
    tokens, pruned = decode_here(subject.target, draft, subject.prompts[:8], 3)
    opened.trunk.vocabulary_C = None
    full_tokens, full = decode_here(subject.target, draft, subject.prompts[:8], 3)
    assert tokens == full_tokens
    assert full != pruned
    plain = Engine([Route(subject.target.forward, frozenset())], num_slots=8, max_length=200, k=0)
    done = plain.run(
        Request(str(i), ids, SamplingParams(max_new_tokens=TOKENS))
        for i, ids in enumerate(subject.prompts[:8])
    )
    assert tokens == [one.tokens for one in done]


def test_the_record_has_the_fields_of_the_format_and_engines_end(
    family: Family, subject: Subject, tmp_path: Path, vllm: type[FakeVllm]
) -> None:
    task = family.task(dtype="float32")
    said: list[str] = []
    found = verify(
        task, export(task, tmp_path / "out"), family.trunk_folder / "expert.safetensors", subject, said.append
    )
    assert list(json.loads(json.dumps(found.to_dict()))) == [
        "target", "k", "dtype", "tau_farm", "tau_vllm", "tau_farm_pruned", "sequences", "differing",
        "gap_at_first_difference", "tokens_per_s_plain", "tokens_per_s_base_draft", "tokens_per_s_adapted",
    ]  # fmt: skip
    assert (found.target, found.k, found.sequences, found.differing) == ("tiny", 3, NUM_PROMPTS, 0)
    assert found.tau_farm_pruned is not None
    assert found.failures() == []
    assert found.tokens_per_s_plain == TOKENS / 0.5
    plain, base, adapted = (engine.settings.speculative for engine in vllm.made)
    assert plain is None
    assert adapted == {"method": "eagle", "model": str(tmp_path / "out"), "num_speculative_tokens": 3}
    assert base is not None
    assert base["model"] != adapted["model"]
    assert all(engine.closed and engine.settings.counts for engine in vllm.made)


def test_tokens_that_differ_where_the_target_is_sure_shut_the_gate(
    family: Family, subject: Subject, tmp_path: Path, vllm: type[FakeVllm]
) -> None:
    vllm.flips = {5: 7, 9: 0}
    task = family.task(dtype="float32")
    found = verify(
        task, export(task, tmp_path / "out"), family.trunk_folder / "expert.safetensors", subject, print
    )
    assert found.differing == 2
    assert any("2 sequences differ" in line for line in found.failures())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tau_vllm": 3.9}, "tau"),
        ({"tau_vllm": 4.1}, "tau"),
        ({"tau_vllm": math.nan}, "tau"),
        ({"differing": 1, "gap_at_first_difference": (0.5,)}, "differ"),
        ({"differing": 1, "gap_at_first_difference": (math.nan,)}, "differ"),
    ],
)
def test_the_gate_is_shut(change: dict[str, Any], reason: str) -> None:
    (failure,) = replace(PAR, **change).failures()
    assert reason in failure


def test_the_gate_is_open_within_two_percent_and_at_ties() -> None:
    assert PAR.failures() == []
    assert replace(PAR, tau_vllm=4.07, differing=1, gap_at_first_difference=(1e-5,)).failures() == []


def test_a_full_head_that_costs_more_than_three_percent_is_said() -> None:
    assert PAR.warnings() == []
    assert replace(PAR, tau_farm_pruned=4.1).warnings() == []
    (warning,) = replace(PAR, tau_farm_pruned=4.2).warnings()
    assert "training" in warning


def test_answers_part_at_their_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 9, 9]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2


def test_the_gap_is_that_of_the_targets_two_best_logits(family: Family, subject: Subject) -> None:
    ids = [3, 1, 4, 1, 5]
    with torch.inference_mode():
        best, second = family.model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
    assert top_two_gap(subject.target, ids) == pytest.approx(best - second, rel=1e-4)


def test_too_few_or_too_long_prompts_are_refused(subject: Subject) -> None:
    room = subject.target.max_positions - TOKENS
    with pytest.raises(UserError, match="63 held-out prompts.*evaluate.prompts"):
        fitting(replace(subject, prompts=(*subject.prompts[1:], (1,) * room)), 3)


def test_the_gate_asks_no_more_prompts_than_it_wants(subject: Subject) -> None:
    twice = replace(subject, prompts=(*subject.prompts, *subject.prompts[::-1]))
    assert fitting(twice, 3) == list(subject.prompts)


def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="verify with --to vllm"):
        as_verified(family.task(ServingEngine.SGLANG))
    with pytest.raises(UserError, match="leave out --dtype bfloat16"):
        as_verified(family.task(dtype="bfloat16"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="make vllm-venv"):
        as_verified(family.task())
    monkeypatch.setattr(parity, "find_python", lambda: Path("python"))
    assert as_verified(family.task()).dtype == "float32"


def test_engines_take_turns(vllm: type[FakeVllm], subject: Subject) -> None:
    asked: list[str] = []

    class Slow(FakeVllm):
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def generate(self, prompts: Any, num_new: Any, slots: int) -> VllmAnswer:
            asked.append(self.name)
            return VllmAnswer([], self.seconds, 0, 0)

    speeds = measure_speeds({"a": Slow("a", 1.0), "b": Slow("b", 2.0)}, subject.prompts[:2], 3)
    assert asked == ["a", "b"] * 7
    assert speeds == {"a": TOKENS, "b": TOKENS / 2}


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllm_says_and_accepts_what_ours_does_on_a_target_of_the_zoo(tmp_path: Path) -> None:
    """`make test-vllm` makes the zoo; every figure of the gate comes from the two engines."""
    assert ZOO.exists(), f"{ZOO} is made by `make test-vllm`"
    out = tmp_path / "draft"
    done = CliRunner().invoke(app, ["export", "math", "--to", "vllm", "--out", str(out), "--verify"])
    print(done.output)
    assert done.exit_code == 0, done.exception
    found = json.loads((out / "parity.json").read_text())
    assert (found["target"], found["sequences"], found["dtype"]) == ("math", NUM_PROMPTS, "float32")
    assert found["tau_vllm"] == pytest.approx(found["tau_farm"], rel=0.02)
    assert found["tau_vllm"] > 2, "a draft that is not read rightly is hardly ever accepted"
    assert found["tokens_per_s_adapted"] > found["tokens_per_s_base_draft"]
