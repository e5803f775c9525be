"""The plan: what is keyed by what, what is reused, which mistake concerns whom. Needs no Ray."""

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from farm.artifacts import Artifacts, key_of
from farm.config import Manifest, UserError, dump
from farm.fleet.answers import ANSWERS, decode_prompts, encode_prompts, missing_shards
from farm.fleet.chosen import SCORES_FILE, SELECT
from farm.fleet.estimate import estimate_target, plan_table, read_rates
from farm.fleet.plan import ADAPT, EVALUATE, PROBE, TRUNK, Plan, make_plan, probe_key
from farm.fleet.publish import evaluation_key
from farm.registry import Registry
from farm.sections import ProbeSettings, TargetSpec
from farm.store import open_store
from farm.target import zoo


def _digest(spec: TargetSpec) -> str:
    return f"digest of {spec.model}"


def _manifest(root: Path, *names: str, **sections: object) -> Manifest:
    for name in names:
        lines = [json.dumps({"prompt": f"{name} {row}"}) for row in range(20)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    targets = tuple(TargetSpec(name=name, model=name, prompts=str(root / f"{name}.jsonl")) for name in names)
    sections = {"evaluate": {"prompts": 4}, "regenerate": {"shard_rows": 5}, **sections}
    return Manifest(base="base", store=(root / "store").as_uri(), targets=targets, **sections)


def _plan(root: Path, manifest: Manifest) -> Plan:
    return make_plan(manifest, Artifacts(open_store(manifest.store)), _digest)


def test_held_out_rows_are_neither_adapted_on_nor_seen_by_the_trunk(tmp_path: Path) -> None:
    plan = _plan(tmp_path, _manifest(tmp_path, "a", "b"))
    for target in plan.targets:
        assert {p.row for p in target.held_out} == {16, 17, 18, 19}
        assert {p.row for p in target.answers.prompts} == set(range(16))
        assert target.answers.num_shards == 4
    assert plan.trunk.answers is not None
    texts = [prompt.messages[0]["content"] for prompt in plan.trunk.answers.prompts]
    assert len(texts) == len({p.row for p in plan.trunk.answers.prompts}) == 32
    assert not {"a 16", "b 19"} & set(texts)


def test_a_prompt_that_a_held_out_row_repeats_is_counted_and_not_adapted_on(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a")
    file = tmp_path / "a.jsonl"
    rows = file.read_text().splitlines()
    rows[3] = rows[18]
    file.write_text("\n".join(rows) + "\n")
    (target,) = _plan(tmp_path, manifest).targets
    assert {p.row for p in target.answers.prompts} == set(range(16)) - {3}
    assert target.answers.source["row_errors"] == [{"row": 3, "reason": "is held out too"}]


def test_all_rows_held_out_too_refuse_the_target_with_the_reason(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a")
    (tmp_path / "a.jsonl").write_text('{"prompt": "the same"}\n' * 20)
    why = "no usable row to adapt on (row 0 is held out too); repair its rows"
    assert why in _plan(tmp_path, manifest).refused["a"]


def _asked_of_the_base(plan: Plan) -> list[str]:
    assert plan.trunk.answers is not None
    assert [prompt.row for prompt in plan.trunk.answers.prompts] == list(
        range(len(plan.trunk.answers.prompts))
    )
    return [prompt.messages[0]["content"] for prompt in plan.trunk.answers.prompts]


def test_the_base_answers_once_what_several_targets_ask(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a", "b")
    a, b = manifest.targets
    shared = manifest.model_copy(update={"targets": (a, b.model_copy(update={"prompts": a.prompts}))})
    assert _asked_of_the_base(_plan(tmp_path, shared)) == [f"a {row}" for row in range(16)]


def test_prompts_that_are_yet_to_be_made_up_are_counted_for_each_target(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a", "b", elicit={"prompts": 10})
    bare = tuple(spec.model_copy(update={"prompts": ""}) for spec in manifest.targets)
    artifacts = Artifacts(open_store(manifest.store))
    plan = make_plan(manifest.model_copy(update={"targets": bare}), artifacts, _digest, stand_in=True)
    assert len(_asked_of_the_base(plan)) == 2 * (10 - 4)


def test_what_is_held_out_for_one_target_is_not_learned_by_the_trunk_from_another(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a", "b")
    with (tmp_path / "b.jsonl").open() as file:
        rows = file.read().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([json.dumps({"prompt": "a 17"}), *rows[1:]]) + "\n")
    asked = _asked_of_the_base(_plan(tmp_path, manifest))
    assert asked == [f"a {row}" for row in range(16)] + [f"b {row}" for row in range(1, 16)]


def test_prompts_of_the_trunks_own_are_not_those_held_out_for_a_target(tmp_path: Path) -> None:
    """Which they are is no part of its key: a target that is added must not change the trunk of all others."""
    own = {"prompts": str(tmp_path / "general.jsonl")}
    manifest = _manifest(tmp_path, "a", "general", train_trunk=own)
    lines = [
        json.dumps({"prompt": text}) for text in ("a 17", "a 3", "a 3", *(f"x {row}" for row in range(6)))
    ]
    (tmp_path / "general.jsonl").write_text("\n".join(lines) + "\n")
    b = TargetSpec(name="b", model="b", prompts=str(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"prompt": f"b {row}"}) for row in range(20)))
    plans = [
        _plan(tmp_path, manifest.model_copy(update={"targets": targets}))
        for targets in (manifest.targets[:1], (b,))
    ]
    rows = []
    for plan in plans:
        assert plan.trunk.answers is not None
        rows.append([prompt.row for prompt in plan.trunk.answers.prompts])
    assert rows == [[1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert plans[0].trunk.key == plans[1].trunk.key


def test_prompts_of_the_trunk_are_split_too(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a", "general")
    own = {"prompts": str(tmp_path / "general.jsonl")}
    plan = _plan(
        tmp_path, manifest.model_copy(update={"train_trunk": manifest.train_trunk.model_copy(update=own)})
    )
    assert plan.trunk.answers is not None
    assert {p.row for p in plan.trunk.answers.prompts} == set(range(16))
    assert {p.row for p in plan.trunk.held_out} == {16, 17, 18, 19}


def test_an_added_target_changes_no_other_key(tmp_path: Path) -> None:
    one, two = (_plan(tmp_path, _manifest(tmp_path, *names)) for names in ("a", "ab"))
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
    before, after = (_plan(tmp_path, _manifest(tmp_path, "a", **s)) for s in ({}, section))
    assert (before.targets[0].answers.key != after.targets[0].answers.key) == changes_answers
    assert (before.trunk.key != after.trunk.key) == changes_trunk
    decides = changes_answers or changes_trunk or "adapt" in section
    assert (before.targets[0].adapt_key != after.targets[0].adapt_key) == decides


def test_how_often_a_checkpoint_is_written_changes_no_key(tmp_path: Path) -> None:
    before, after = (_plan(tmp_path, _manifest(tmp_path, "a", adapt={"save_every": n})) for n in (1, 2))
    assert before.targets[0].adapt_key == after.targets[0].adapt_key


@pytest.mark.parametrize(
    ("section", "setting"),
    [("adapt", "cached_bytes"), ("adapt", "micro_rows"), ("train_trunk", "micro_rows")],
)
def test_a_bound_and_how_a_step_is_cut_change_no_key(tmp_path: Path, section: str, setting: str) -> None:
    before, after = (
        _plan(tmp_path, _manifest(tmp_path, "a", **{section: settings})) for settings in ({}, {setting: 7})
    )
    assert before.trunk.key == after.trunk.key
    assert before.targets[0].adapt_key == after.targets[0].adapt_key


def test_what_a_probe_is_used_for_changes_no_key(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a")
    plan = _plan(tmp_path, manifest)
    keys = {
        probe_key(manifest, plan.targets[0], ProbeSettings(skip_above=above), plan.trunk.key)
        for above in (None, 0.5, 0.9)
    }
    settings = {"prompts": 16, "max_new_tokens": 48, "skip_above": None}
    config = {"settings": settings, "k": manifest.evaluate.k, "dtype": "auto"}
    config["prompts"] = [asdict(prompt) for prompt in plan.targets[0].held_out]
    assert keys == {key_of(PROBE, config, [plan.targets[0].digest, plan.trunk.key])}, "that of older stores"


def test_a_trunk_is_named_by_the_rows_it_is_trained_on(tmp_path: Path) -> None:
    """Without a range of its own they are all but those that are held out, and so many as an evaluation takes."""

    def key(rows: tuple[int, int] | None, held_out: int) -> str:
        own = {"prompts": str(tmp_path / "general.jsonl"), "rows": rows}
        sections = {"train_trunk": own, "evaluate": {"prompts": held_out}}
        _manifest(tmp_path, "general")
        return _plan(tmp_path, _manifest(tmp_path, "a", **sections)).trunk.key

    assert key(None, 4) != key(None, 8)
    assert key((0, 16), 4) == key((0, 16), 8) == key(None, 4), "these are the same rows"
    assert key((0, 12), 4) == key(None, 8)


def test_a_target_without_usable_prompts_is_refused_alone(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a", "b")
    (tmp_path / "b.jsonl").write_text("\n")
    plan = _plan(tmp_path, manifest)
    assert [target.name for target in plan.targets] == ["a"]
    assert "no prompts" in plan.refused["b"]


def test_a_broken_line_is_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a")
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": \n' + file.read_text())
    (target,) = _plan(tmp_path, manifest).targets
    assert len(target.answers.prompts) == 16  # 21 rows, 4 held out, 1 broken
    assert [error["row"] for error in target.answers.source["row_errors"]] == [0]


def test_a_base_without_a_template_answers_by_that_of_its_targets(tmp_path: Path) -> None:
    tokenizer = zoo.train_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    manifest = _manifest(tmp_path, "a").model_copy(update={"base": str(tmp_path / "base")})
    template = "{{ messages[0].content }}"
    targets = tuple(spec.model_copy(update={"chat_template": template}) for spec in manifest.targets)
    trunk = _plan(tmp_path, manifest.model_copy(update={"targets": targets})).trunk
    assert trunk.answers is not None
    assert trunk.base.chat_template == trunk.answers.spec.chat_template == template


def test_a_given_trunk_without_its_files_is_a_mistake_of_the_whole_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"draft\.json does not exist"):
        _plan(tmp_path, _manifest(tmp_path, "a", trunk=str(tmp_path / "nothing")))


def test_a_finished_shard_is_not_missing_and_a_finished_artifact_has_none(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a")
    artifacts = Artifacts(open_store(manifest.store))
    job = _plan(tmp_path, manifest).targets[0].answers
    artifacts.put_file(ANSWERS, job.key, "tokens-00001.parquet", b"without its card a shard is not finished")
    assert missing_shards(artifacts, job) == [0, 1, 2, 3]
    artifacts.put_file(ANSWERS, job.key, "shard-00001.json", b"{}")
    assert missing_shards(artifacts, job) == [0, 2, 3]
    artifacts.finish(ANSWERS, job.key, {})
    assert missing_shards(artifacts, job) == []


def test_prompts_survive_the_way_to_an_actor(tmp_path: Path) -> None:
    prompts = _plan(tmp_path, _manifest(tmp_path, "a")).targets[0].answers.prompts
    assert tuple(decode_prompts(encode_prompts(prompts))) == prompts


def test_the_plan_says_what_is_reused_and_costs_nothing_again(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a", "b")
    artifacts = Artifacts(open_store(manifest.store))
    plan = _plan(tmp_path, manifest)
    artifacts.finish(TRUNK, plan.trunk.key, {})
    artifacts.finish(ANSWERS, plan.targets[0].answers.key, {"seconds": 8.0, "answer_tokens": 16})
    artifacts.finish(ADAPT, plan.targets[0].adapt_key, {"seconds": 3.0, "trained_tokens": 300})
    plan = _plan(tmp_path, manifest)
    assert plan.trunk.reused
    assert [target.reused for target in plan.targets] == [(ANSWERS, ADAPT), ()]
    rates = read_rates(plan, artifacts)
    assert (rates.decode_s, rates.train_s) == (0.5, 0.01)
    assert estimate_target(plan, plan.targets[0], rates).seconds == 0
    costs = estimate_target(plan, plan.targets[1], rates)
    assert costs.rows == 16
    assert costs.seconds > 16 * manifest.regenerate.max_new_tokens * 0.5
    assert plan_table(plan, artifacts).row_count == 4  # trunk, two targets, together


@pytest.mark.parametrize(("evaluate", "runs"), [({"min_gain": 9.0}, "–"), ({"k": 2}, "evaluate")])
def test_an_evaluation_is_reused_where_onboarding_finds_it(
    tmp_path: Path, evaluate: dict[str, object], runs: str
) -> None:
    manifest = _manifest(tmp_path, "a")
    artifacts = Artifacts(open_store(manifest.store))
    plan = _plan(tmp_path, manifest)
    target = plan.targets[0]
    artifacts.finish(ANSWERS, target.answers.key, {"seconds": 8.0, "answer_tokens": 16})
    artifacts.finish(ADAPT, target.adapt_key, {"seconds": 3.0, "trained_tokens": 300})
    artifacts.finish(EVALUATE, evaluation_key(manifest, target, None), {})
    registry = Registry(artifacts.store)
    card = {"adapt_key": target.adapt_key, "trunk_key": plan.trunk.key, "opponent": None}
    assert registry.promote("a", registry.publish("a", {}, card).version, None)
    after = _plan(tmp_path, _manifest(tmp_path, "a", evaluate={"prompts": 4, **evaluate}))
    assert plan_table(after, artifacts).columns[1]._cells[1] == runs


def test_without_a_selection_keys_are_those_of_stores_that_know_none(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a")
    plan = _plan(tmp_path, manifest)
    (target,) = plan.targets
    settings = {name: value for name, value in dump(manifest.adapt).items() if name != "save_every"}
    assert target.select_key is None
    assert target.adapt_key == key_of(ADAPT, settings, [target.answers.key, plan.trunk.key, target.digest])


def test_a_selection_changes_what_is_adapted_and_nothing_before_it(tmp_path: Path) -> None:
    plans = [
        _plan(tmp_path, _manifest(tmp_path, "a", select=select))
        for select in ({}, {"strategy": "shift"}, {"strategy": "shift", "fraction": 0.25})
    ]
    assert len({plan.targets[0].adapt_key for plan in plans}) == 3
    assert len({plan.targets[0].select_key for plan in plans}) == 3
    assert len({plan.targets[0].answers.key for plan in plans}) == 1
    assert len({plan.trunk.key for plan in plans}) == 1
    rates = read_rates(plans[0], Artifacts(open_store(plans[0].manifest.store)))
    whole, half, quarter = (estimate_target(plan, plan.targets[0], rates).seconds for plan in plans)
    assert whole > half > quarter


def test_the_source_of_a_row_decides_its_stratum_and_so_the_selection(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, "a", select={"strategy": "random"})
    before = _plan(tmp_path, manifest).targets[0]
    lines = [json.dumps({"prompt": f"a {row}", "source": "b" if row % 2 else "c"}) for row in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    after = _plan(tmp_path, manifest).targets[0]
    assert set(before.origins.values()) == {"a.jsonl"}
    assert set(after.origins.values()) == {"b", "c"}
    assert after.answers.key == before.answers.key
    assert after.select_key != before.select_key


def test_where_an_endpoint_is_decides_no_key_but_that_one_answers_does(tmp_path: Path) -> None:
    def answers(**regenerate: object) -> str:
        manifest = _manifest(tmp_path, "a", regenerate={"shard_rows": 5, **regenerate})
        return _plan(tmp_path, manifest).targets[0].answers.key

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
        _plan(tmp_path, _manifest(tmp_path, "a", select=select))
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
        _plan(tmp_path, _manifest(tmp_path, "a", **{"select": BEFORE, **changes})).targets[0]
        for changes in ({}, section)
    )
    assert (before.select_key != after.select_key) == again
    assert before.adapt_key != after.adapt_key


def test_the_plan_counts_the_prompts_that_will_be_answered_and_finds_those_that_were_chosen(
    tmp_path: Path,
) -> None:
    manifest = _manifest(tmp_path, "a", select=BEFORE)
    store = Artifacts(open_store(manifest.store))
    plan = _plan(tmp_path, manifest)
    rates = read_rates(plan, store)
    whole = _plan(tmp_path, _manifest(tmp_path, "a"))
    costs = [estimate_target(one, one.targets[0], rates) for one in (whole, plan)]
    assert [cost.rows for cost in costs] == [16, 4]
    assert costs[1].tokens == costs[0].tokens / 4
    assert costs[1].seconds == pytest.approx(costs[0].seconds / 4)
    runs = plan_table(plan, store).columns[1]._cells[1]
    assert runs == "select, answers, adapt, evaluate"

    _choose(manifest, plan, {1, 4, 9})
    chosen = _plan(tmp_path, manifest)
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
    manifest = _manifest(tmp_path, "a", "b", select=BEFORE)
    plan = _plan(tmp_path, manifest)
    _choose(manifest, plan, {1, 4, 9})
    (scores,) = (tmp_path / "store").rglob(SCORES_FILE)
    damage(scores)
    after = _plan(tmp_path, manifest)
    assert [target.name for target in after.targets] == ["b"]
    assert (
        f"delete {'what is left in ' if damage is Path.unlink else ''}{scores.parent}" in after.refused["a"]
    )


def test_who_drafts_answers_decides_none_of_them_and_so_no_key(tmp_path: Path) -> None:
    plain, drafted = (
        _plan(tmp_path, _manifest(tmp_path, "a", regenerate={"shard_rows": 5, "draft": draft}))
        for draft in ("off", "base")
    )
    assert drafted.targets[0].answers.key == plain.targets[0].answers.key
    assert drafted.targets[0].answers.settings.draft == "base"
    assert drafted.trunk.key == plain.trunk.key
    assert drafted.trunk.answers is not None
    assert drafted.trunk.answers.settings.draft == "off"  # the base answers before there is a trunk
