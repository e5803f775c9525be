"""`farm export` finds what is live, `farm import eagle` makes a trunk of it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from farm.artifacts import TRUNK, Artifacts
from farm.cli.main import app
from farm.config import UserError
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE
from farm.registry import Registry
from farm.store import open_store
from tests.farm.export.drafts import Family, make_family, predict_of, proposals
from tests.farm.export.eagle1 import Eagle1
from tests.farm.export.test_folder import prompts


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """In a store of its own with a manifest: `tiny` has a live adapter, `other` has none."""
    family = make_family(tmp_path)
    store = open_store(str(tmp_path / "store"))
    artifacts, registry = Artifacts(store), Registry(store)
    for file in family.trunk_folder.iterdir():
        artifacts.put_file(TRUNK, "key", file.name, file.read_bytes())
    artifacts.finish(TRUNK, "key", {})
    registry.put_family({"trunk_key": "key"})
    version = registry.publish("tiny", {EXPERT_FILE: family.expert.read_bytes()}, {"trunk_key": "key"})
    assert registry.promote("tiny", version.version, None)
    target = {"model": family.target.model, "prompts": str(tmp_path / "prompts.jsonl")}
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n')
    manifest = {
        "base": family.target.model, "store": str(tmp_path / "store"), "evaluate": {"k": 2},
        "targets": [{"name": "tiny", **target}, {"name": "other", **target}],
    }  # fmt: skip
    (tmp_path / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return family


def run(tmp_path: Path, target: str, *options: str) -> str:
    """What the command prints; a mistake is raised."""
    arguments = [
        "export",
        target,
        "--out",
        str(tmp_path / "out"),
        "--manifest",
        str(tmp_path / "manifest.yaml"),
    ]
    done = CliRunner().invoke(app, [*arguments, *options])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_the_live_draft_is_exported_and_comes_back_as_a_trunk(family: Family, tmp_path: Path) -> None:
    assert str(tmp_path / "out") in run(tmp_path, "tiny", "--to", "vllm", "--pad", "16").replace("\n", "")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (card["target"], card["version"]) == ("tiny", "v1")
    assert '"num_speculative_tokens": 2' in (tmp_path / "out" / "README.md").read_text()
    theirs = Eagle1.load(tmp_path / "out")
    for tokens in prompts()[:4]:
        ours, _ = proposals(predict_of(family.draft), family.model, tokens, 4)
        assert ours.equal(proposals(theirs, family.model, tokens, 4)[0])
    done = CliRunner().invoke(
        app, ["import", "eagle", str(tmp_path / "out"), "--out", str(tmp_path / "imported")]
    )
    assert done.exit_code == 0, done.output
    assert {file.name for file in (tmp_path / "imported").iterdir()} == {
        "draft.json",
        TRUNK_FILE,
        EXPERT_FILE,
    }


def test_the_bases_own_draft_is_another_one(family: Family, tmp_path: Path) -> None:
    run(tmp_path, "base", "--to", "sglang")
    theirs = Eagle1.load(tmp_path / "out")
    pairs = [
        [proposals(draft, family.model, tokens, 4)[0] for draft in (predict_of(family.draft), theirs)]
        for tokens in prompts()
    ]
    assert any(not ours.equal(other) for ours, other in pairs)


def test_mistakes_say_what_to_do(family: Family, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other: has no live adapter.*farm onboard"):
        run(tmp_path, "other", "--to", "vllm")
    with pytest.raises(UserError, match="no such target; choose one of base, tiny, other"):
        run(tmp_path, "nobody", "--to", "vllm")
    with pytest.raises(UserError, match="leave out --dtype bfloat16"):
        run(tmp_path, "tiny", "--to", "vllm", "--verify", "--dtype", "bfloat16")
    (tmp_path / "manifest.yaml").unlink()
    with pytest.raises(UserError, match="give a family's --manifest"):
        run(tmp_path, "tiny", "--to", "vllm")
    assert not (tmp_path / "out").exists()
