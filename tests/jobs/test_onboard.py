"""The entry points: exit codes, one clear line for a mistake, a plan that starts nothing."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from farm.config import dump
from farm.store import open_store
from jobs import evaluate, onboard, train_trunk
from tests.farm.fleet.family import Family

runner = CliRunner()


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    family = tmp_path / "family"
    family.mkdir()
    path = tmp_path / "manifest.yaml"
    settled = Family(family).manifest("alpha", store=tmp_path / "store")
    path.write_text(yaml.safe_dump(dump(settled)))
    return path


def test_a_mistake_is_one_line_with_its_remedy_and_exit_code_2(tmp_path: Path) -> None:
    for app, options in (
        (onboard.app, []),
        (train_trunk.app, []),
        (evaluate.app, ["--target", "a", "--prompts", "p.jsonl", "--out", str(tmp_path / "o.json")]),
    ):
        done = runner.invoke(app, [str(tmp_path / "absent.yaml"), *options])
        assert done.exit_code == 2
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_dry_run_shows_the_plan_and_writes_nothing(manifest: Path, tmp_path: Path) -> None:
    done = runner.invoke(onboard.app, [str(manifest), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "alpha" in done.stdout
    assert "copy" in done.stdout  # of the given trunk
    trunk = runner.invoke(train_trunk.app, [str(manifest), "--dry-run"])
    assert trunk.exit_code == 0, trunk.output
    assert "copy" in trunk.stdout
    assert "alpha" not in trunk.stdout
    assert open_store(str(tmp_path / "store")).list("") == []


@pytest.mark.ray
def test_a_refused_target_makes_the_exit_code_1_and_is_in_the_report(
    ray_cluster: object, manifest: Path, tmp_path: Path
) -> None:
    (tmp_path / "family" / "alpha" / "model.safetensors").write_bytes(b"not safetensors")
    done = runner.invoke(onboard.app, [str(manifest)])
    assert done.exit_code == 1, done.output
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("report: file://")
    assert last.endswith("/report.json")
    assert Path(last.removeprefix("report: file://")).is_file()


@pytest.mark.ray
def test_evaluating_a_store_without_a_family_is_a_mistake_not_a_crash(
    ray_cluster: object, manifest: Path, tmp_path: Path
) -> None:
    options = ["--target", "alpha", "--prompts", str(tmp_path / "family" / "alpha.jsonl")]
    done = runner.invoke(evaluate.app, [str(manifest), *options, "--out", str(tmp_path / "out.json")])
    assert done.exit_code == 2, done.output
    assert "holds no family" in done.stderr
