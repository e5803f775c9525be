"""The plan: what is keyed by what, what is reused, which mistake concerns whom. Needs no Ray."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from farm.artifacts import TRUNK, Artifacts, key_of
from farm.config import Manifest, dump
from farm.fleet.answers import ANSWERS, decode_prompts, encode_prompts, missing_shards
from farm.fleet.chosen import SCORES_FILE, SELECT
from farm.fleet.estimate import estimate_target, plan_table, read_rates, trunk_table
from farm.fleet.publish import evaluation_key
from farm.fleet.records import Plan
from farm.fleet.stage_keys import ADAPT, EVALUATE
from farm.registry import Registry
from farm.store import open_store
from tests.farm.fleet.planned import manifest_of, plan_of


def test_held_out_rows_are_neither_adapted_on_nor_seen_by_the_trunk(tmp_path: Path) -> None:
    plan = plan_of(manifest_of(tmp_path, "a", "b"))
    for target in plan.targets:
        assert {p.row for p in target.held_out} == {16, 17, 18, 19}
        assert {p.row for p in target.answers.prompts} == set(range(16))
        assert target.answers.num_shards == 4
    assert plan.trunk.answers is not None
    texts = [prompt.messages[0]["content"] for prompt in plan.trunk.answers.prompts]
    assert len(texts) == len({p.row for p in plan.trunk.answers.prompts}) == 32
    assert not {"a 16", "b 19"} & set(texts)


def test_a_prompt_that_a_held_out_row_repeats_is_counted_and_not_adapted_on(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a")
    file = tmp_path / "a.jsonl"
    rows = file.read_text().splitlines()
    rows[3] = rows[18]
    file.write_text("\n".join(rows) + "\n")
    (target,) = plan_of(manifest).targets
    assert {p.row for p in target.answers.prompts} == set(range(16)) - {3}
    assert target.answers.source["row_errors"] == [{"row": 3, "reason": "is held out too"}]


def test_all_rows_held_out_too_refuse_the_target_with_the_reason(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a")
    (tmp_path / "a.jsonl").write_text('{"prompt": "the same"}\n' * 20)
    why = "no usable row to adapt on (row 0 is held out too); repair its rows"
    assert why in plan_of(manifest).refused["a"]


@pytest.mark.parametrize("evaluate", [{"prompts": 1}, {"rows": (19, None)}])
def test_a_single_held_out_row_refuses_the_target_before_anything_is_done(
    tmp_path: Path, evaluate: dict[str, object]
) -> None:
    """Its evaluation would, once the target is answered and adapted."""
    plan = plan_of(manifest_of(tmp_path, "a", evaluate=evaluate))
    assert "a.jsonl: 1 usable row held out, 2 are needed" in plan.refused["a"]


def test_an_added_target_changes_no_other_key(tmp_path: Path) -> None:
    one, two = (plan_of(manifest_of(tmp_path, *names)) for names in ("a", "ab"))
    assert one.trunk.key == two.trunk.key
    assert one.targets[0].adapt_key == two.targets[0].adapt_key


@pytest.mark.parametrize(
    ("section", "changes_answers", "changes_trunk"),
    [
        ({"regenerate": {"shard_rows": 5, "temperature": 0.1}}, True, False),
        ({"regenerate": {"shard_rows": 5, "memory_bytes": 1}}, False, False),
        ({"adapt": {"lr": 0.5}}, False, False),
        ({"train_trunk": {"lr": 0.5}}, False, True),
    ],
)
def test_a_setting_changes_the_keys_of_what_it_decides(
    tmp_path: Path, section: dict[str, object], changes_answers: bool, changes_trunk: bool
) -> None:
    before, after = (plan_of(manifest_of(tmp_path, "a", **s)) for s in ({}, section))
    assert (before.targets[0].answers.key != after.targets[0].answers.key) == changes_answers
    assert (before.trunk.key != after.trunk.key) == changes_trunk
    decides = changes_answers or changes_trunk or "adapt" in section
    assert (before.targets[0].adapt_key != after.targets[0].adapt_key) == decides


def test_a_target_without_usable_prompts_is_refused_alone(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a", "b")
    (tmp_path / "b.jsonl").write_text("\n")
    plan = plan_of(manifest)
    assert [target.name for target in plan.targets] == ["a"]
    assert "no prompts" in plan.refused["b"]


def test_a_broken_line_is_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a")
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": \n' + file.read_text())
    (target,) = plan_of(manifest).targets
    assert len(target.answers.prompts) == 16  # 21 rows, 4 held out, 1 broken
    assert [error["row"] for error in target.answers.source["row_errors"]] == [0]


def test_a_finished_shard_is_not_missing_and_a_finished_artifact_has_none(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a")
    artifacts = Artifacts(open_store(manifest.store))
    job = plan_of(manifest).targets[0].answers
    artifacts.put_file(ANSWERS, job.key, "tokens-00001.parquet", b"without its card a shard is not finished")
    assert missing_shards(artifacts, job) == [0, 1, 2, 3]
    artifacts.put_file(ANSWERS, job.key, "shard-00001.json", b"{}")
    assert missing_shards(artifacts, job) == [0, 2, 3]
    artifacts.finish(ANSWERS, job.key, {})
    assert missing_shards(artifacts, job) == []


def test_prompts_survive_the_way_to_an_actor(tmp_path: Path) -> None:
    prompts = plan_of(manifest_of(tmp_path, "a")).targets[0].answers.prompts
    assert tuple(decode_prompts(encode_prompts(prompts))) == prompts


def test_the_plan_says_what_is_reused_and_costs_nothing_again(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a", "b")
    artifacts = Artifacts(open_store(manifest.store))
    plan = plan_of(manifest)
    artifacts.finish(TRUNK, plan.trunk.key, {})
    artifacts.finish(ANSWERS, plan.targets[0].answers.key, {"seconds": 8.0, "answer_tokens": 16})
    artifacts.finish(ADAPT, plan.targets[0].adapt_key, {"seconds": 3.0, "trained_tokens": 300})
    plan = plan_of(manifest)
    assert plan.trunk.reused
    assert [target.reused for target in plan.targets] == [(ANSWERS, ADAPT), ()]
    rates = read_rates(plan, artifacts)
    assert (rates.decode_s, rates.train_s) == (0.5, 0.01)
    assert estimate_target(plan, plan.targets[0], rates).seconds == 0
    costs = estimate_target(plan, plan.targets[1], rates)
    assert costs.rows == 16
    assert costs.seconds > 16 * manifest.regenerate.max_new_tokens * 0.5
    assert plan_table(plan, artifacts).row_count == 4  # trunk, two targets, together


def test_a_trunk_whose_base_has_answered_is_only_trained(tmp_path: Path) -> None:
    """As after a training that failed."""
    manifest = manifest_of(tmp_path, "a")
    artifacts = Artifacts(open_store(manifest.store))
    plan = plan_of(manifest)
    assert plan.trunk.answers is not None
    before = trunk_table(plan, artifacts)
    artifacts.finish(ANSWERS, plan.trunk.answers.key, {})
    after = trunk_table(plan, artifacts)
    cells = [[column._cells[0] for column in table.columns] for table in (before, after)]
    assert [row[1:3] for row in cells] == [["answers, train", "–"], ["train", "answers"]]
    assert [row[3] for row in cells] == ["16", "0"]


@pytest.mark.parametrize(("evaluate", "runs"), [({"min_gain": 9.0}, "–"), ({"k": 2}, "evaluate")])
def test_an_evaluation_is_reused_where_onboarding_finds_it(
    tmp_path: Path, evaluate: dict[str, object], runs: str
) -> None:
    manifest = manifest_of(tmp_path, "a")
    artifacts = Artifacts(open_store(manifest.store))
    plan = plan_of(manifest)
    target = plan.targets[0]
    artifacts.finish(ANSWERS, target.answers.key, {"seconds": 8.0, "answer_tokens": 16})
    artifacts.finish(ADAPT, target.adapt_key, {"seconds": 3.0, "trained_tokens": 300})
    artifacts.finish(EVALUATE, evaluation_key(manifest, target, None), {})
    registry = Registry(artifacts.store)
    card = {"adapt_key": target.adapt_key, "trunk_key": plan.trunk.key, "opponent": None}
    assert registry.promote("a", registry.publish("a", {}, card).version, None)
    after = plan_of(manifest_of(tmp_path, "a", evaluate={"prompts": 4, **evaluate}))
    assert plan_table(after, artifacts).columns[1]._cells[1] == runs


def test_without_a_selection_keys_are_those_of_stores_that_know_none(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a")
    plan = plan_of(manifest)
    (target,) = plan.targets
    settings = {name: value for name, value in dump(manifest.adapt).items() if name != "save_every"}
    assert target.select_key is None
    assert target.adapt_key == key_of(ADAPT, settings, [target.answers.key, plan.trunk.key, target.digest])


def test_a_selection_changes_what_is_adapted_and_nothing_before_it(tmp_path: Path) -> None:
    plans = [
        plan_of(manifest_of(tmp_path, "a", select=select))
        for select in ({}, {"strategy": "shift"}, {"strategy": "shift", "fraction": 0.25})
    ]
    assert len({plan.targets[0].adapt_key for plan in plans}) == 3
    assert len({plan.targets[0].select_key for plan in plans}) == 3
    assert len({plan.targets[0].answers.key for plan in plans}) == 1
    assert len({plan.trunk.key for plan in plans}) == 1
    rates = read_rates(plans[0], Artifacts(open_store(plans[0].manifest.store)))
    whole, half, quarter = (estimate_target(plan, plan.targets[0], rates).seconds for plan in plans)
    assert whole > half > quarter


def test_a_selection_that_leaves_less_than_a_row_is_planned_all_the_same(tmp_path: Path) -> None:
    select = {"strategy": "random", "fraction": 0.01}
    plan = plan_of(manifest_of(tmp_path, "a", select=select, adapt={"tokens": 1000}))
    rates = read_rates(plan, Artifacts(open_store(plan.manifest.store)))
    assert estimate_target(plan, plan.targets[0], rates).rows == 16


def test_the_source_of_a_row_decides_its_stratum_and_so_the_selection(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a", select={"strategy": "random"})
    before = plan_of(manifest).targets[0]
    lines = [json.dumps({"prompt": f"a {row}", "source": "b" if row % 2 else "c"}) for row in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    after = plan_of(manifest).targets[0]
    assert set(before.origins.values()) == {"a.jsonl"}
    assert set(after.origins.values()) == {"b", "c"}
    assert after.answers.key == before.answers.key
    assert after.select_key != before.select_key


def test_where_an_endpoint_is_decides_no_key_but_that_one_answers_does(tmp_path: Path) -> None:
    def answers(**regenerate: object) -> str:
        manifest = manifest_of(tmp_path, "a", regenerate={"shard_rows": 5, **regenerate})
        return plan_of(manifest).targets[0].answers.key

    here, there = answers(), answers(engine="openai", url="http://a:1/v1")
    assert here != there
    assert answers(engine="openai", url="http://b:2/v1", api_key_env="KEY", concurrency=3) == there
    assert answers(url="http://b:2/v1") == here


BEFORE = {"strategy": "shift", "before": True, "fraction": 0.25}


def _choose(manifest: Manifest, plan: Plan, rows: set[int]) -> None:
    """Put a finished selection of the first target's prompts into the store."""
    artifacts, key = Artifacts(open_store(manifest.store)), plan.targets[0].select_key
    assert key is not None
    table, buffer = (
        pa.table({"row": list(range(16)), "chosen": [row in rows for row in range(16)]}),
        io.BytesIO(),
    )
    pq.write_table(table, buffer)
    artifacts.put_file(SELECT, key, SCORES_FILE, buffer.getvalue())
    artifacts.finish(SELECT, key, {})


def test_chosen_prompts_have_answers_of_their_own_and_the_trunk_stays(tmp_path: Path) -> None:
    plans = [
        plan_of(manifest_of(tmp_path, "a", select=select))
        for select in ({}, BEFORE, {**BEFORE, "fraction": 0.5}, {"strategy": "shift", "fraction": 0.25})
    ]
    targets = [plan.targets[0] for plan in plans]
    whole, quarter, half, after = targets
    assert len({target.adapt_key for target in targets}) == 4
    assert len({target.select_key for target in targets}) == 4
    assert len({whole.answers.key, quarter.answers.key, half.answers.key}) == 3
    assert after.answers.key == whole.answers.key
    assert len({plan.trunk.key for plan in plans}) == 1
    assert quarter.answers.feature_bytes > 0  # all of them are trained on, so that features may be kept
    assert quarter.answers.source["select_key"] == quarter.select_key  # so that cleaning up keeps both


@pytest.mark.parametrize(
    ("section", "again"),
    [
        ({"regenerate": {"shard_rows": 5, "temperature": 0.1}}, False),
        ({"train_trunk": {"lr": 0.5}}, False),
        ({"regenerate": {"shard_rows": 5, "turns": "last"}}, True),
        ({"regenerate": {"shard_rows": 5, "rows": (0, 8)}}, True),
        ({"select": {**BEFORE, "seed": 1}}, True),
        ({"dtype": "bfloat16"}, True),
    ],
)
def test_prompts_are_chosen_again_only_for_what_decides_their_scores(
    tmp_path: Path, section: dict[str, object], again: bool
) -> None:
    before, after = (
        plan_of(manifest_of(tmp_path, "a", **{"select": BEFORE, **changes})).targets[0]
        for changes in ({}, section)
    )
    assert (before.select_key != after.select_key) == again
    assert before.adapt_key != after.adapt_key


def test_the_plan_counts_the_prompts_that_will_be_answered_and_finds_those_that_were_chosen(
    tmp_path: Path,
) -> None:
    manifest = manifest_of(tmp_path, "a", select=BEFORE)
    store = Artifacts(open_store(manifest.store))
    plan = plan_of(manifest)
    rates = read_rates(plan, store)
    whole = plan_of(manifest_of(tmp_path, "a"))
    costs = [estimate_target(one, one.targets[0], rates) for one in (whole, plan)]
    assert [cost.rows for cost in costs] == [16, 4]
    assert costs[1].tokens == costs[0].tokens / 4
    assert costs[1].seconds == pytest.approx(costs[0].seconds / 4)
    runs = plan_table(plan, store).columns[1]._cells[1]
    assert runs == "select, answers, adapt, evaluate"

    _choose(manifest, plan, {1, 4, 9})
    chosen = plan_of(manifest)
    (target,) = chosen.targets
    assert target.reused == (SELECT,)
    assert [prompt.row for prompt in target.answers.prompts] == [1, 4, 9]
    assert target.answers.key == plan.targets[0].answers.key
    assert estimate_target(chosen, target, rates).rows == 3
    assert chosen.trunk.answers == plan.trunk.answers  # of all prompts, as before


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"cut")], ids=["gone", "cut"])
def test_a_target_whose_selection_is_damaged_is_refused_alone(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    manifest = manifest_of(tmp_path, "a", "b", select=BEFORE)
    plan = plan_of(manifest)
    _choose(manifest, plan, {1, 4, 9})
    (scores,) = (tmp_path / "store").rglob(SCORES_FILE)
    damage(scores)
    after = plan_of(manifest)
    assert [target.name for target in after.targets] == ["b"]
    assert (
        f"delete {'what is left in ' if damage is Path.unlink else ''}{scores.parent}" in after.refused["a"]
    )


def test_who_drafts_answers_decides_none_of_them_and_so_no_key(tmp_path: Path) -> None:
    plain, drafted = (
        plan_of(manifest_of(tmp_path, "a", regenerate={"shard_rows": 5, "draft": draft}))
        for draft in ("off", "base")
    )
    assert drafted.targets[0].answers.key == plain.targets[0].answers.key
    assert drafted.targets[0].answers.settings.draft == "base"
    assert drafted.trunk.key == plain.trunk.key
    assert drafted.trunk.answers is not None
    assert drafted.trunk.answers.settings.draft == "off"  # the base answers before there is a trunk
