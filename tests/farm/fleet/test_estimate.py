"""What is assumed of a base before anything was measured: the weights that a step moves are those of its index."""

import json
from pathlib import Path

import pytest

from farm.artifacts import Artifacts
from farm.config import Manifest
from farm.fleet.estimate import ASSUMED_BYTES_PER_S, read_rates
from farm.fleet.plan import make_plan
from farm.sections import TargetSpec
from farm.store import open_store

SHARDS = {"model-00001-of-00002.safetensors": 1000, "model-00002-of-00002.safetensors": 200}


def assumed_bytes(root: Path) -> float:
    """Of the base in `root`, by what a token is expected to take."""
    (root / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    targets = (TargetSpec(name="a", model="a", prompts=str(root / "a.jsonl")),)
    manifest = Manifest(base=str(root / "base"), store=(root / "store").as_uri(), targets=targets)
    artifacts = Artifacts(open_store(manifest.store))
    rates = read_rates(make_plan(manifest, artifacts, lambda spec: spec.name), artifacts)
    assert not rates.measured
    return rates.decode_s * ASSUMED_BYTES_PER_S * manifest.regenerate.batch_rows


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of two shards with an index, beside which an earlier download has left a third."""
    folder = tmp_path / "base"
    folder.mkdir()
    for name, size in {**SHARDS, "model-00009-of-00009.safetensors": 5000}.items():
        (folder / name).write_bytes(bytes(size))
    index = {"weight_map": {f"weight of {name}": name for name in SHARDS}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_that_the_index_does_not_name_are_not_counted(tmp_path: Path, base: Path) -> None:
    assert assumed_bytes(tmp_path) == pytest.approx(sum(SHARDS.values()))


def test_a_base_that_is_not_whole_or_not_there_is_estimated_all_the_same(tmp_path: Path, base: Path) -> None:
    """Its targets are refused, with the reason, by the run."""
    first, second = SHARDS
    (base / second).unlink()
    assert assumed_bytes(tmp_path) == pytest.approx(SHARDS[first])
    (base / "model.safetensors.index.json").write_text("{")
    assert assumed_bytes(tmp_path) == 0
    base.rename(tmp_path / "elsewhere")
    assert assumed_bytes(tmp_path) == 0
