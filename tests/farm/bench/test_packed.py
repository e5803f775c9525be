"""The benchmark of packs: the same training on both sides, what a pack takes beyond it, a store left as it was."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from farm.artifacts import TRUNK, Artifacts
from farm.bench.packed import BOUND_S, Cost, Side, Trained, lines, table
from farm.cli.main import app
from farm.config import Manifest, UserError, dump
from farm.data.features import write_shard
from farm.decode.regenerate import regenerate_rows
from farm.fleet.answers import ANSWERS
from farm.fleet.chosen import SCORES_FILE, SELECT
from farm.fleet.pack_cost import in_turn, onboarded_jobs
from farm.fleet.plan import make_plan
from farm.sections import SelectSettings
from farm.store import open_store
from farm.target.load import open_target, target_digest
from tests.farm.fleet.family import Family


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of two targets, one of which has answers in a store that holds the trunk too."""
    root = tmp_path_factory.mktemp("family")
    family = Family(root)
    manifest = family.manifest("legal", "code", store=root / "store", adapt={"epochs": 3, "seed": 5})
    artifacts = Artifacts(open_store(manifest.store))
    plan = make_plan(manifest, artifacts, target_digest)
    for file in family.trunk.iterdir():
        artifacts.put_file(TRUNK, plan.trunk.key, file.name, file.read_bytes())
    artifacts.finish(TRUNK, plan.trunk.key, {})
    answers = plan.targets[0].answers
    decoded = regenerate_rows(open_target(answers.spec, "float32"), answers.prompts, answers.settings)
    write_shard(artifacts, ANSWERS, answers.key, 0, decoded)
    artifacts.finish(ANSWERS, answers.key, {"answer_tokens": 100})
    return manifest


def side(wall_s: float, loop_s: float, num_runs: int, names: str = "ab") -> Side:
    trained = [Trained(f"{i}-{name}", name, 0, 10, 99, loop_s, loop_s + 1.0) for i, name in enumerate(names)]
    return Side("packed" if num_runs == 1 else "runs", num_runs, 1, 1, 2, wall_s, tuple(trained))


def test_a_pack_is_bounded_by_its_own_loops_and_held_against_the_wall_clock_of_runs() -> None:
    cost = Cost(side(10.0 + BOUND_S, 5.0, 1), side(110.0, 7.0, 2))
    assert (cost.ratio, cost.beyond_loops_s, cost.within_bound) == (0.5, BOUND_S, True)
    assert lines(cost) == [
        "2 targets in one run take 0.50 of the time of 2 runs of their own",
        "beyond its loops the packed run took 45.0 s: at most 45 s is met",
        "of these, 43.0 s are its start and end, the rest is between the loops of its targets",
    ]
    late = replace(cost, packed=side(10.1 + BOUND_S, 5.0, 1, "aa"))
    assert not late.within_bound
    assert lines(late)[1].endswith("missed")
    assert "the data of a were used in turn" in lines(late)[-1]
    beside = replace(cost, runs=replace(cost.runs, at_once=2))
    assert list(table(cost).columns[-1].cells) == ["45.0", "96.0"]
    assert list(table(beside).columns[-1].cells) == ["45.0", ""], "seconds of loops side by side overlap"


def test_targets_without_answers_are_left_out_and_the_others_stand_for_them_under_other_seeds(
    manifest: Manifest,
) -> None:
    (only,) = jobs = onboarded_jobs(manifest, print)
    assert only.name == "legal"
    code = replace(only, name="code", key="another")
    five = in_turn([*jobs, code], 5)
    assert [job.name for job in five] == ["01-legal", "02-code", "03-legal", "04-code", "05-legal"]
    assert [job.task.settings.seed for job in five] == [5, 5, 6, 6, 7]
    assert len({job.key for job in five}) == 5, "else the second would be found, not trained"
    assert [job.task.target.name for job in five] == [job.name for job in five], (
        "a pack tells them apart by it"
    )


def test_prompts_that_were_chosen_before_are_adapted_on_as_an_onboarding_does(
    manifest: Manifest, tmp_path: Path
) -> None:
    """Of a selection of prompts nobody knows how many tokens the answers have: the answers say it."""
    store = tmp_path / "store"
    shutil.copytree(Path(unquote(urlparse(manifest.store).path)), store)
    select = SelectSettings(strategy="random", before=True)
    manifest = manifest.model_copy(update={"store": store.as_uri(), "select": select})
    artifacts = Artifacts(open_store(manifest.store))
    target = make_plan(manifest, artifacts, target_digest).targets[0]
    scores = io.BytesIO()
    rows = [prompt.row for prompt in target.answers.prompts]
    pq.write_table(pa.table({"row": rows, "chosen": [row < 8 for row in rows]}), scores)
    artifacts.put_file(SELECT, str(target.select_key), SCORES_FILE, scores.getvalue())
    artifacts.finish(SELECT, str(target.select_key), {"prompt_tokens": 30})
    write_shard(artifacts, ANSWERS, target.answers.key, 0, [])
    artifacts.finish(ANSWERS, target.answers.key, {"answer_tokens": 50})
    (job,) = onboarded_jobs(manifest, print)
    assert job.record["trained_tokens"] == 50 * manifest.adapt.epochs
    assert job.task.rows is None, "all of these answers"


def test_a_store_without_the_familys_answers_says_what_to_do(manifest: Manifest, tmp_path: Path) -> None:
    empty = manifest.model_copy(update={"store": tmp_path.as_uri()})
    with pytest.raises(UserError, match="has no trunk of this family; run `farm onboard`"):
        onboarded_jobs(empty, print)
    other = manifest.model_copy(update={"targets": manifest.targets[1:]})
    with pytest.raises(UserError, match="has no answers of this family; run `farm onboard`"):
        onboarded_jobs(other, print)


@pytest.mark.slow  # four Ray Train runs; packs themselves are in test_packs.py
@pytest.mark.ray
def test_both_sides_train_the_same_and_the_store_is_left_as_it_was(
    ray_cluster: object, manifest: Manifest, tmp_path: Path
) -> None:
    path, store = tmp_path / "tiny.yaml", open_store(manifest.store)
    path.write_text(yaml.safe_dump(dump(manifest)))
    before = store.list("")
    done = CliRunner().invoke(
        app, ["bench", "packed", str(path), "--quick", "--targets", "2", "--out", str(tmp_path / "out")]
    )
    assert done.exit_code == 0, done.output
    assert "the data of legal were used in turn under 2 seeds" in done.output
    assert store.list("") == before
    assert not list(Path(store.location("x")).parent.glob("bench-*"))
    record = json.loads((tmp_path / "out" / "packed.json").read_text())
    packed, runs = record["packed"], record["runs"]
    assert (packed["num_runs"], packed["at_once"]) == (1, 1)
    assert (runs["num_runs"], runs["at_once"]) == (2, 2)
    same = ("name", "data", "seed", "steps", "positions")
    assert [[one[key] for key in same] for one in packed["trained"]] == [
        [one[key] for key in same] for one in runs["trained"]
    ]
    assert [one["seed"] for one in packed["trained"]] == [5, 6]
    assert record["adapt"]["epochs"] == 1
    assert all(0 < one["loop_s"] < one["seconds"] for side in (packed, runs) for one in side["trained"])
    # The pack's targets lie in its wall clock one after the other, beside what starts and ends the run.
    assert 0 < record["around_s"] < record["beyond_loops_s"]
    assert runs["wall_s"] > max(one["seconds"] for one in runs["trained"])
    assert record["beyond_loops_s"] == pytest.approx(packed["wall_s"] - packed["loops_s"])
    assert record["ratio"] == pytest.approx(packed["wall_s"] / runs["wall_s"])
