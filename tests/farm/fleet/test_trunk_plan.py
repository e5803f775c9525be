"""The trunk's plan: what the base is asked, what is held out from it, what names it. Needs no Ray."""

import json
from pathlib import Path

import pytest

from farm.artifacts import TRUNK, Artifacts
from farm.config import Manifest, UserError
from farm.data.chat import TEXT_TEMPLATE
from farm.fleet.plan import make_plan
from farm.fleet.records import Plan
from farm.fleet.stage_keys import TRUNK_FILES
from farm.registry import Registry
from farm.sections import TargetSpec
from farm.store import open_store
from farm.target import zoo
from tests.farm.fleet.planned import digest_of, manifest_of, plan_of


def _asked_of_the_base(plan: Plan) -> list[str]:
    assert plan.trunk.answers is not None
    assert [prompt.row for prompt in plan.trunk.answers.prompts] == list(
        range(len(plan.trunk.answers.prompts))
    )
    return [prompt.messages[0]["content"] for prompt in plan.trunk.answers.prompts]


def test_the_base_answers_once_what_several_targets_ask(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a", "b")
    a, b = manifest.targets
    shared = manifest.model_copy(update={"targets": (a, b.model_copy(update={"prompts": a.prompts}))})
    assert _asked_of_the_base(plan_of(shared)) == [f"a {row}" for row in range(16)]


def test_prompts_that_are_yet_to_be_made_up_are_counted_for_each_target(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a", "b", elicit={"prompts": 10})
    bare = tuple(spec.model_copy(update={"prompts": ""}) for spec in manifest.targets)
    artifacts = Artifacts(open_store(manifest.store))
    plan = make_plan(manifest.model_copy(update={"targets": bare}), artifacts, digest_of, stand_in=True)
    assert len(_asked_of_the_base(plan)) == 2 * (10 - 4)


def test_what_is_held_out_for_one_target_is_not_learned_by_the_trunk_from_another(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a", "b")
    with (tmp_path / "b.jsonl").open() as file:
        rows = file.read().splitlines()
    (tmp_path / "b.jsonl").write_text("\n".join([json.dumps({"prompt": "a 17"}), *rows[1:]]) + "\n")
    asked = _asked_of_the_base(plan_of(manifest))
    assert asked == [f"a {row}" for row in range(16)] + [f"b {row}" for row in range(1, 16)]


def test_prompts_of_the_trunks_own_are_not_those_held_out_for_a_target(tmp_path: Path) -> None:
    """Which they are is no part of its key: a target that is added must not change the trunk of all others."""
    own = {"prompts": str(tmp_path / "general.jsonl")}
    manifest = manifest_of(tmp_path, "a", "general", train_trunk=own)
    lines = [
        json.dumps({"prompt": text}) for text in ("a 17", "a 3", "a 3", *(f"x {row}" for row in range(6)))
    ]
    (tmp_path / "general.jsonl").write_text("\n".join(lines) + "\n")
    b = TargetSpec(name="b", model="b", prompts=str(tmp_path / "b.jsonl"))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"prompt": f"b {row}"}) for row in range(20)))
    plans = [
        plan_of(manifest.model_copy(update={"targets": targets})) for targets in (manifest.targets[:1], (b,))
    ]
    rows = []
    for plan in plans:
        assert plan.trunk.answers is not None
        rows.append([prompt.row for prompt in plan.trunk.answers.prompts])
    assert rows == [[1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert plans[0].trunk.key == plans[1].trunk.key


def test_prompts_of_the_trunk_are_split_too(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a", "general")
    own = {"prompts": str(tmp_path / "general.jsonl")}
    plan = plan_of(manifest.model_copy(update={"train_trunk": manifest.train_trunk.model_copy(update=own)}))
    assert plan.trunk.answers is not None
    assert {p.row for p in plan.trunk.answers.prompts} == set(range(16))
    assert {p.row for p in plan.trunk.held_out} == {16, 17, 18, 19}


def test_a_trunk_is_named_by_the_rows_it_is_trained_on(tmp_path: Path) -> None:
    """Without a range of its own they are all but those that are held out, and so many as an evaluation takes."""

    def key(rows: tuple[int, int] | None, held_out: int) -> str:
        own = {"prompts": str(tmp_path / "general.jsonl"), "rows": rows}
        sections = {"train_trunk": own, "evaluate": {"prompts": held_out}}
        manifest_of(tmp_path, "general")
        return plan_of(manifest_of(tmp_path, "a", **sections)).trunk.key

    assert key(None, 4) != key(None, 8)
    assert key((0, 16), 4) == key((0, 16), 8) == key(None, 4), "these are the same rows"
    assert key((0, 12), 4) == key(None, 8)


def test_a_base_without_a_template_answers_by_that_of_its_targets(tmp_path: Path) -> None:
    tokenizer = zoo.train_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    manifest = manifest_of(tmp_path, "a").model_copy(update={"base": str(tmp_path / "base")})
    template = "{{ messages[0].content }}"
    targets = tuple(spec.model_copy(update={"chat_template": template}) for spec in manifest.targets)
    trunk = plan_of(manifest.model_copy(update={"targets": targets})).trunk
    assert trunk.answers is not None
    assert trunk.base.chat_template == trunk.answers.spec.chat_template == template


def test_a_template_that_targets_lend_the_base_is_no_part_of_the_trunks_key(tmp_path: Path) -> None:
    """A target that is added, or whose tokenizer cannot be read today, would have all others adapted again."""
    tokenizer = zoo.train_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "base")
    manifest = manifest_of(tmp_path, "a", "b").model_copy(update={"base": str(tmp_path / "base")})
    a, b = (
        spec.model_copy(update={"chat_template": f"{spec.name} {{{{ messages[0].content }}}}"})
        for spec in manifest.targets
    )
    plans = [
        make_plan(
            manifest.model_copy(update={"targets": targets}),
            Artifacts(open_store(manifest.store)),
            lambda spec: f"digest of {spec.model} and {spec.chat_template}",
        )
        for targets in ((a,), (a, b), (a, b.model_copy(update={"chat_template": "gone.jinja"})))
    ]
    assert [plan.trunk.base.chat_template for plan in plans] == [
        a.chat_template,
        TEXT_TEMPLATE,
        a.chat_template,
    ]
    assert len({plan.trunk.key for plan in plans}) == 1
    assert len({plan.targets[0].adapt_key for plan in plans}) == 1


def test_a_trunk_that_is_trained_again_for_one_that_is_lost_is_another_one(tmp_path: Path) -> None:
    """What was adapted on the lost one would be found again, and refused wherever it is loaded."""
    manifest = manifest_of(tmp_path, "a")
    artifacts = Artifacts(open_store(manifest.store))
    plans = [plan_of(manifest)]
    for _ in range(3):
        key = plans[-1].trunk.key
        artifacts.finish(TRUNK, key, {})
        Registry(artifacts.store).put_family({"trunk_key": key, "targets": {}})
        again = plan_of(manifest)
        assert (again.trunk.key, again.trunk.reused) == (key, True)
        artifacts.store.delete(f"artifacts/{TRUNK}/{key}/manifest.json")
        plans.append(plan_of(manifest))
    assert len({plan.trunk.key for plan in plans}) == 4
    assert len({plan.targets[0].adapt_key for plan in plans}) == 4
    assert len({plan.targets[0].answers.key for plan in plans}) == 1


def test_a_trunk_that_nothing_was_adapted_on_yet_is_the_same_when_it_is_trained_again(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a")
    artifacts, key = Artifacts(open_store(manifest.store)), plan_of(manifest).trunk.key
    artifacts.finish(TRUNK, key, {})
    artifacts.store.delete(f"artifacts/{TRUNK}/{key}/manifest.json")
    Registry(artifacts.store).put_family({"trunk_key": "of other settings", "targets": {}})
    assert plan_of(manifest).trunk.key == key


def test_a_given_trunk_without_its_files_is_a_mistake_of_the_whole_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"draft\.json does not exist"):
        plan_of(manifest_of(tmp_path, "a", trunk=str(tmp_path / "nothing")))


def _write(file: Path, *asked: str) -> None:
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))


def _all_held_out(root: Path, own: bool) -> Manifest:
    """Every prompt that a trunk could be trained on is held out for one of two targets."""
    trunk = {"prompts": str(root / "general.jsonl"), "rows": (0, 3)}
    manifest = manifest_of(root, "a", "b", **({"train_trunk": trunk} if own else {}))
    _write(root / "general.jsonl", "a 16", "a 17", "a 18")
    if not own:
        a, b = ([f"{name} {row}" for row in range(4)] for name in "ab")
        _write(root / "a.jsonl", *b, *a)
        _write(root / "b.jsonl", *a, *b)
    return manifest


@pytest.mark.parametrize("own", [True, False])
def test_a_trunk_whose_prompts_are_all_held_out_is_a_mistake_of_the_whole_manifest(
    tmp_path: Path, own: bool
) -> None:
    """It is told by the plan, with the file, the field and the remedy; a trunk that is there needs no prompts."""
    manifest = _all_held_out(tmp_path, own)
    source = str(tmp_path / "general.jsonl") if own else "all that the targets ask"
    with pytest.raises(UserError) as told:
        plan_of(manifest)
    message = str(told.value)
    assert message.startswith("train_trunk.prompts: ")
    assert source in message
    assert "give a file with other prompts, or hold out less: evaluate.rows, evaluate.prompts" in message

    given = tmp_path / "trunk"
    given.mkdir()
    for name in TRUNK_FILES:
        (given / name).write_bytes(b"")
    assert plan_of(manifest.model_copy(update={"trunk": str(given)})).trunk.answers is None


def test_a_trunk_in_the_store_needs_no_prompts(tmp_path: Path) -> None:
    general = tmp_path / "general.jsonl"
    manifest = manifest_of(tmp_path, "a", "general", train_trunk={"prompts": str(general), "rows": (0, 3)})
    _write(general, "b 16", "b 17", "b 18")
    before = plan_of(manifest.model_copy(update={"targets": manifest.targets[:1]}))
    assert before.trunk.answers is not None
    Artifacts(open_store(manifest.store)).finish(TRUNK, before.trunk.key, {})
    later = manifest_of(tmp_path, "a", "b").targets
    assert plan_of(manifest.model_copy(update={"targets": later})).trunk.reused
