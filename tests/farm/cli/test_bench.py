"""Results say which family they are of; a benchmark runs from the manifest of a family that was never onboarded."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farm.bench.operators import DTYPES
from farm.cli.bench import family_name
from farm.cli.bench_adapt import extent
from farm.cli.main import app
from farm.target import zoo
from tests.farm.models import tiny_model


@pytest.mark.parametrize(
    ("manifest", "name"),
    [
        (".farm/zoo/manifest.yaml", "zoo"),
        ("jobs/recipes/smollm2.yaml", "smollm2"),
        ("/data/legal/manifest.yml", "legal"),
    ],
)
def test_a_family_is_called_by_its_manifest_or_by_the_folder_of_it(manifest: str, name: str) -> None:
    assert family_name(Path(manifest)) == name


def test_a_manifest_in_the_working_directory_is_called_by_that_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path / "own")
    assert family_name(Path("manifest.yaml")) == "own"


def test_what_is_given_counts_in_a_quick_run_too() -> None:
    full = ["math", "code"]
    assert extent(full, None, None, quick=False) == (full, 3)
    assert extent(full, None, None, quick=True) == (["math"], 1)
    assert extent(full, ["code", "lora0"], 2, quick=True) == (["code", "lora0"], 2)


def test_operators_are_measured_at_the_sizes_of_a_manifests_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    zoo.save(tiny_model(vocab=1024), zoo.train_tokenizer(), tmp_path / "base")
    (tmp_path / "math.jsonl").write_text('{"prompt": "Add one and two."}\n')
    manifest = tmp_path / "tiny.yaml"
    manifest.write_text(
        "base: base\nstore: store\ntargets: [{name: math, model: base, prompts: math.jsonl}]\n"
    )
    options = ["--out", str(tmp_path / "bench"), "--repeats", "3"]
    done = CliRunner().invoke(app, ["bench", "operators", str(manifest), *options])
    assert done.exit_code == 0, done.output
    assert "gate and up, 32 to 128" in done.output  # a line is not folded where there is no terminal
    rows = json.loads((tmp_path / "bench" / "operators.json").read_text())["rows"]
    assert {row["model"] for row in rows} == {"tiny"}
    assert {row["dtype"] for row in rows} == set(DTYPES)
    assert all(row["library_s"] > 0 and row["ours_s"] > 0 for row in rows)
