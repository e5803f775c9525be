"""Commands that make models and onboard them: what they refuse, plan and print, before anything is trained."""

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from farm.cli.main import app
from farm.config import Manifest, UserError, dump
from farm.registry import Registry
from farm.status import StatusBoard, TargetStatus
from farm.store import open_store
from tests.farm.fleet.family import Family

runner = CliRunner()


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


def written(manifest: Manifest, folder: Path) -> str:
    path = folder / "manifest.yaml"
    path.write_text(yaml.safe_dump(dump(manifest)))
    return str(path)


def test_json_of_a_status_is_the_records_and_what_is_live(family: Family, tmp_path: Path) -> None:
    manifest = family.manifest("alpha", "beta", store=tmp_path / "store")
    store = open_store(manifest.store)
    board = StatusBoard(store, "run")
    board.open(["alpha", "beta"])
    board.update("alpha", stage="regenerate", rows_done=3, rows_total=8)
    board.update("beta", decision="failed", error="first [/line]\nlast line")
    registry = Registry(store)
    assert registry.promote("alpha", registry.publish("alpha", {}, {}).version, None)
    path = written(manifest, tmp_path)
    done = runner.invoke(app, ["status", path, "--json"])
    shown = json.loads(done.stdout)
    assert shown["live"] == {"alpha": "v1"}
    alpha, beta = (TargetStatus.model_validate(record) for record in shown["targets"])
    assert (alpha.stage, alpha.rows_done, alpha.rows_total) == ("regenerate", 3, 8)
    assert beta.error == "first [/line]\nlast line"
    with pytest.raises(UserError, match="--json"):
        runner.invoke(app, ["status", path, "--json", "--watch"], catch_exceptions=False)


def test_the_plan_of_a_trunk_says_what_runs_and_starts_nothing(family: Family, tmp_path: Path) -> None:
    manifest = family.manifest("alpha", "beta", store=tmp_path / "store", trunk=False)
    done = runner.invoke(app, ["train-trunk", written(manifest, tmp_path), "--dry-run"])
    assert done.exit_code == 0, done.output
    (row,) = (line for line in done.output.splitlines() if "trunk" in line)
    assert "answers, train" in row
    assert " 32 " in row  # sixteen prompts of each target
    assert open_store(manifest.store).list("") == []


def test_the_plan_of_a_trunk_names_who_cannot_be_asked(family: Family, tmp_path: Path) -> None:
    manifest = family.manifest("alpha", "beta", store=tmp_path / "store", trunk=False)
    alpha, beta = manifest.targets
    lost = beta.model_copy(update={"model": str(tmp_path / "lost")})
    one = manifest.model_copy(update={"targets": (alpha, lost)})
    done = runner.invoke(app, ["train-trunk", written(one, tmp_path), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert f"beta: refused: beta: {tmp_path / 'lost'}" in done.output
    none = manifest.model_copy(update={"targets": (lost,)})
    with pytest.raises(UserError, match=r"no prompts to train a trunk on.*beta: refused"):
        runner.invoke(app, ["train-trunk", written(none, tmp_path), "--dry-run"], catch_exceptions=False)


@pytest.mark.parametrize("rows", ["1000", "a:b", "", "1:2:3"])
def test_rows_that_are_no_range_are_refused(rows: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "say a", "answer": "a"}\n')
    options = ["--base", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "made")]
    with pytest.raises(UserError, match="is no range; write START:STOP"):
        runner.invoke(app, ["finetune", *options, "--rows", rows], catch_exceptions=False)


def test_a_target_is_not_made_over_a_folder_that_holds_something(family: Family, tmp_path: Path) -> None:
    """The base itself would be lost that way."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "say a", "answer": "a"}\n')
    before = {path: path.read_bytes() for path in family.base.iterdir()}
    options = ["--base", str(family.base), "--data", str(rows), "--rows", "0:1", "--steps", "1"]
    with pytest.raises(UserError, match=r"--out .*: is there already"):
        runner.invoke(app, ["finetune", *options, "--out", str(family.base)], catch_exceptions=False)
    assert {path: path.read_bytes() for path in family.base.iterdir()} == before
    done = runner.invoke(app, ["finetune", *options, "--out", str(tmp_path / "my model")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "my model" / "model.safetensors").is_file()
