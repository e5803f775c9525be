"""What a manifest and a probe say to do for a draft that shares no trunk: a target as the base of its own store."""

import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from farm.cli.main import app
from farm.config import dump
from farm.draft.checkpoint import load_trunk
from farm.evaluate.published import Published
from farm.fleet.onboard import onboard
from tests.farm.fleet.family import Family

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_target_that_is_the_base_of_its_own_store_gets_a_whole_draft_that_is_exported(
    ray_cluster: object, family: Family, store: Path, tmp_path: Path
) -> None:
    shared = family.manifest("alpha", store=store, trunk=False)
    manifest = shared.model_copy(update={"base": shared.targets[0].model})
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(dump(manifest)))

    report, _ = onboard(manifest, lambda _line: None)

    assert [row.decision for row in report.targets] == ["promoted"]
    own = load_trunk(Published.of(manifest.store).trunk_folder)
    out = tmp_path / "draft"
    arguments = ["alpha", "--to", "vllm", "--out", str(out), "--manifest", str(tmp_path / "manifest.yaml")]
    exported = CliRunner().invoke(app, ["export", *arguments])
    assert exported.exit_code == 0, exported.output
    fc = load_file(out / "model.safetensors")["fc.weight"]
    assert fc.shape == own.fc.weight.shape
    assert json.loads((out / "card.json").read_text())["base_digest"]
    assert (fc.float() - own.fc.weight).abs().max() < 1e-2
