"""The benchmark of decoding: every arm emits the same tokens' number, ratios are paired, results can be read."""

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from farm.bench import decode
from farm.bench.arms import Arm, quick_arms, with_vllm
from farm.bench.decode import Durations, Row, largest, measure
from farm.bench.family import Member
from farm.bench.floor import Floor
from farm.bench.report import (
    against,
    beside_best_fixed,
    grouped,
    key_of,
    origin,
    over_best,
    predicted,
    ratio,
    table,
    write,
)
from farm.bench.vllm_engine import VllmAnswer, VllmEngine, VllmSettings
from farm.decode.control import Load
from farm.decode.renewal import Cost
from farm.draft.config import DraftConfig
from farm.draft.model import new_draft
from farm.target.forward import TargetForward
from farm.target.load import LoadedTarget
from tests.farm.models import tiny_model

ROW = Row(
    "zoo", "t", "farm", "off", "none", 1, 0, "equal", "float32", 2, 0, 100.0, 1.0, 10, 0.0, 1.0, 0.1, 0.1, 0.1
)


ONCE = Durations(warm_up_s=0.0, learning_rounds=0, measured_s=0.0)


@pytest.fixture(scope="module")
def member() -> Member:
    model = tiny_model(max_position_embeddings=512)
    model.generation_config.pad_token_id = 0
    forward = TargetForward.of(model)
    target = LoadedTarget("t", forward, None, frozenset(), forward.num_bytes, None, 512, model.config)
    drafts = [
        new_draft(DraftConfig.for_base(model.config), seed, std=0.3).requires_grad_(False) for seed in (1, 2)
    ]
    prompts = tuple(tuple(range(1, 4 + i)) for i in range(5))
    return Member("t", target, drafts[0], drafts[1], model, "float32", prompts)


def test_every_arm_answers_every_request_with_as_many_tokens_as_were_asked_for(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that stopped early or late would look fast or slow; the arms themselves check their counts."""
    monkeypatch.setattr(decode, "EQUAL_TOKENS", 12)
    arms = [*quick_arms(), Arm("transformers-assisted", "off", "none", 1)]
    arms += [
        Arm("farm", "tree-2x4", "adapted", 2),
        Arm("farm", "cost", "adapted", 8, "ragged"),
        Arm("transformers", "off", "none", 8, "ragged"),
    ]
    rows = list(measure(member, "zoo", arms, 3, durations=ONCE))
    assert len(rows) == 3 * len(arms)
    assert {row.repeat for row in rows} == {0, 1, 2}
    assert all(row.tokens_per_s > 0 for row in rows)
    farm = [row for row in rows if row.engine == "farm"]
    assert all(row.verify_s and row.rounds and row.tau for row in farm)
    assert all(row.tau == 1.0 for row in farm if row.draft == "none")


def test_a_short_run_is_repeated_until_it_can_be_measured(member: Member) -> None:
    """Half a millisecond is the machine's mood; rounds, seconds and tau are those of all passes together."""
    arm = Arm("farm", "fixed-4", "adapted", 8)
    (once,) = measure(member, "zoo", [arm], 1, durations=ONCE)
    (often,) = measure(member, "zoo", [arm], 1, durations=replace(ONCE, measured_s=0.2))
    assert once.rounds
    assert often.rounds
    assert often.verify_s
    passes = often.rounds / once.rounds
    assert passes > 1
    assert passes == round(passes), "greedy decoding takes the same rounds every time"
    assert often.tau == pytest.approx(once.tau)
    tokens = passes * 8 * decode.EQUAL_TOKENS
    assert 0.02 < often.verify_s < tokens / often.tokens_per_s, "part of the seconds of all passes"


def test_a_control_has_learned_for_as_many_rounds_whatever_a_round_takes(
    member: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a second is five hundred rounds of a small model and twenty of a larger one: its first steps alone."""
    asked = []

    class Counting(Cost):
        def limit(self, load: Load) -> int:
            asked.append(load)
            return super().limit(load)

    monkeypatch.setattr(decode, "make_control", lambda _name, most: Counting(most))
    arm = Arm("farm", "cost", "adapted", 8)
    (row,) = measure(member, "zoo", [arm], 1, durations=replace(ONCE, learning_rounds=300))
    assert row.rounds
    assert len(asked) - row.rounds / 8 >= 300


def test_a_target_without_an_adapter_is_measured_without_its_arms(member: Member) -> None:
    rows = list(measure(replace(member, adapted=None), "zoo", quick_arms()[:6], 1, durations=ONCE))
    assert {row.draft for row in rows} == {"none", "base"}


class FakeVllm(VllmEngine):
    """Answers in a second for every slot, and remembers what it was asked."""

    def __init__(self, dtype: str, *, too_few: int = 0) -> None:
        self.settings = VllmSettings("m", dtype, 512, 16)
        self.asked: list[tuple[int, int]] = []
        self.too_few = too_few

    def generate(self, prompts: Sequence[Sequence[int]], num_new: Sequence[int], slots: int) -> VllmAnswer:
        self.asked.append((len(prompts), slots))
        return VllmAnswer([[7] * (new - self.too_few) for new in num_new], float(slots), 0, 0)


def test_rows_of_vllm_carry_its_own_seconds_and_dtype_at_equal_requests(member: Member) -> None:
    engines = {"off": FakeVllm("bfloat16"), "ngram": FakeVllm("bfloat16")}
    arms = with_vllm([Arm("farm", "off", "none", 2), Arm("farm", "off", "none", 8, "ragged")])
    rows = list(measure(member, "zoo", arms, 2, engines))
    vllm = [row for row in rows if row.engine == "vllm"]
    assert {(row.control, row.draft, row.batch, row.workload) for row in vllm} == {
        (control, "none", batch, workload)
        for control in ("off", "ngram")
        for batch, workload in ((2, "equal"), (8, "ragged"))
    }
    assert {row.dtype for row in vllm} == {"bfloat16"}
    assert {row.dtype for row in rows if row.engine == "farm"} == {"float32"}
    tokens = decode.EQUAL_PROMPTS * decode.EQUAL_TOKENS
    assert {row.tokens_per_s for row in vllm if row.batch == 2} == {tokens / 2.0}
    assert engines["ngram"].asked == [(decode.EQUAL_PROMPTS, 2), (64, 8)] * 3, (
        "once to warm up, then a repeat each"
    )
    short = FakeVllm("float32", too_few=1)
    with pytest.raises(AssertionError):
        list(measure(member, "zoo", with_vllm(arms[:1]), 1, {"off": short, "ngram": short}))


def test_an_engine_is_made_for_the_longest_request_of_any_arm(member: Member) -> None:
    longest = max(map(len, member.prompts))
    assert largest(member, [Arm("farm", "off", "none", 16)]) == (longest + decode.EQUAL_TOKENS, 16)
    positions, slots = largest(
        member, [Arm("farm", "off", "none", 1), Arm("farm", "off", "none", 8, "ragged")]
    )
    assert longest + 200 < positions <= longest + 256
    assert slots == 8


def test_ratios_are_taken_within_a_repeat() -> None:
    """A machine that halves its speed half way changes no ratio."""
    slow = [1.0, 1.0, 0.5, 0.5]
    plain = [replace(ROW, repeat=i, tokens_per_s=100 * s) for i, s in enumerate(slow)]
    fast = [replace(r, control="cost", draft="adapted", tokens_per_s=2 * r.tokens_per_s) for r in plain]
    found = against(grouped([*plain, *fast]), key_of(fast[0]), "farm")
    assert found is not None
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)
    assert against(grouped(fast), key_of(fast[0]), "farm") is None


def test_cost_is_compared_with_the_fixed_length_that_was_best_in_the_same_workload() -> None:
    """Of base and adapted draft, of batches and workloads, only what is like it counts."""

    def rows(control: str, speed: float, **changes: Any) -> list[Row]:
        fields = {"control": control, "draft": "adapted", "tokens_per_s": speed} | changes
        return [replace(ROW, repeat=repeat, **fields) for repeat in range(3)]

    arms = [
        *rows("off", 100.0, draft="none"), *rows("fixed-2", 160.0), *rows("fixed-4", 150.0),
        *rows("fixed-6", 300.0, draft="base"), *rows("fixed-6", 300.0, batch=8), *rows("cost", 152.0),
    ]  # fmt: skip
    assert beside_best_fixed(arms) == [
        "t, batch 1, equal: cost is 1.52 of plain decoding and 0.95 of the best fixed length (fixed-2)"
    ]


def test_the_best_of_several_equal_lengths_is_not_chosen_by_its_luck() -> None:
    """Five lengths as fast as `cost`, each a tenth faster by chance in one repeat or two: the truth is 1."""
    rng = random.Random(0)

    def arm(control: str) -> list[Row]:
        fields = {"control": control, "draft": "adapted"}
        return [replace(ROW, repeat=i, tokens_per_s=100 * rng.uniform(0.9, 1.1), **fields) for i in range(5)]

    fair, chosen_by_luck = [], []
    for _ in range(300):
        cost, fixed = arm("cost"), [arm(f"fixed-{k}") for k in (1, 2, 4, 6, 8)]
        fair.append(over_best(cost, fixed).median)
        best = max(fixed, key=lambda rows: statistics.median(row.tokens_per_s for row in rows))
        chosen_by_luck.append(ratio(cost, best).median)
    assert statistics.mean(fair) == pytest.approx(1.0, abs=0.015)
    assert statistics.mean(chosen_by_luck) < 0.98


def test_controls_are_warmed_up_on_prompts_that_are_not_measured(member: Member) -> None:
    member = replace(member, prompts=tuple((i, i) for i in range(2 * decode.EQUAL_PROMPTS)))
    arm = Arm("farm", "cost", "adapted", 1)
    measured, before = decode._tasks(member, arm)
    assert set(measured.prompts).isdisjoint(before.prompts)
    assert measured.num_new == before.num_new


def test_the_prediction_is_tau_over_the_rounds_cost_in_plain_steps() -> None:
    """10 plain steps of 0.1 s; rounds of 0.05 s drafting and 0.15 s verifying emit 3 tokens: 3 / 2."""
    fast = replace(ROW, draft="adapted", tau=3.0, rounds=10, draft_s=0.5, verify_s=1.5)
    assert predicted([fast], [ROW]) == pytest.approx(1.5)


def test_table_plot_and_rows_are_written(
    member: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "EQUAL_TOKENS", 12)
    rows = list(measure(member, "zoo", quick_arms(), 3, durations=ONCE))
    assert table(rows).row_count == len(quick_arms())
    json_path, picture = write(
        tmp_path / "bench", rows, {"t": Floor(10**6, 1e9)}, origin("farm bench decode")
    )
    record = json.loads(json_path.read_text())
    assert {"command", "hardware", "versions", "floors", "rows"} <= record.keys()
    assert len(record["rows"]) == len(rows)
    assert 0 < record["floors"]["t"]["share"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_of_the_ragged_workload_is_drawn_and_one_without_generate_is_kept_all_the_same(
    tmp_path: Path,
) -> None:
    ragged = [replace(ROW, workload="ragged", batch=8, engine=engine) for engine in ("transformers", "farm")]
    assert len(write(tmp_path / "both", ragged, {}, {})) == 2
    (kept,) = write(tmp_path / "ours", ragged[1:], {}, {})
    assert kept.name == "decode.json"
