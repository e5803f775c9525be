"""What a store has published: the trunk of its family, and the live experts that fit this trunk."""

from pathlib import Path

import pytest

from farm.artifacts import TRUNK, Artifacts
from farm.config import Manifest, UserError
from farm.data.chat import TEXT_TEMPLATE
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE
from farm.evaluate import published
from farm.evaluate.published import Published
from farm.evaluate.target import EvaluateTask
from farm.registry import Registry
from farm.sections import TargetSpec
from farm.store import open_store
from farm.target import zoo


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Of a store whose family has the trunk `here`."""
    store = open_store(str(tmp_path))
    artifacts = Artifacts(store)
    artifacts.put_file(TRUNK, "here", EXPERT_FILE, b"of the base")
    artifacts.finish(TRUNK, "here", {})
    registry = Registry(store)
    registry.put_family({"trunk_key": "here"})
    return registry


def publish(registry: Registry, trunk_key: str) -> None:
    live = registry.live("math")
    version = registry.publish("math", {EXPERT_FILE: trunk_key.encode()}, {"trunk_key": trunk_key})
    assert registry.promote("math", version.version, live.version if live else None)


def test_the_live_expert_is_the_newest_one_of_this_trunk_alone(registry: Registry) -> None:
    """An expert over another trunk would draft noise; the base draft is what is left then."""
    found = Published.of(registry.store.uri)
    assert (found.trunk_folder / EXPERT_FILE).read_bytes() == b"of the base"
    assert found.live_expert("math") is None
    publish(registry, "here")
    live = found.live_expert("math")
    assert live is not None
    assert (live.version, live.file.read_bytes()) == ("v1", b"here")
    publish(registry, "another")
    assert found.live_expert("math") is None


def test_a_live_expert_of_other_bytes_of_the_same_trunk_is_refused(registry: Registry) -> None:
    Artifacts(registry.store).put_file(TRUNK, "again", TRUNK_FILE, b"trained again")
    trunk = Artifacts(registry.store).finish(TRUNK, "again", {})
    registry.put_family({"trunk_key": "again"})
    card = {"trunk_key": "again", "trunk_digest": "e" * 64}
    assert registry.promote("math", registry.publish("math", {EXPERT_FILE: b""}, card).version, None)
    with pytest.raises(UserError, match="e" * 64) as caught:
        Published.of(registry.store.uri).live_expert("math")
    assert trunk.manifest["files"][TRUNK_FILE]["sha256"] in str(caught.value)


def test_a_family_without_its_trunk_says_what_to_do(registry: Registry) -> None:
    registry.put_family({"trunk_key": "gone"})
    with pytest.raises(UserError, match="trunk gone is gone; run `farm onboard` again"):
        Published.of(registry.store.uri)


def test_a_target_is_measured_by_the_template_that_it_was_onboarded_with(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = zoo.train_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say"}\n')
    spec = TargetSpec(name="math", model=str(tmp_path / "model"))
    manifest = Manifest(base=spec.model, store=registry.store.uri, targets=(spec,))
    measured: list[EvaluateTask] = []

    def evaluate_target(task: EvaluateTask) -> dict[str, object]:
        measured.append(task)
        return {}

    monkeypatch.setattr(published, "evaluate_target", evaluate_target)
    for name in ("math", "base"):
        published.evaluate_published(manifest, name, str(tmp_path / "prompts.jsonl"))
    assert [task.target.chat_template for task in measured] == [TEXT_TEMPLATE, TEXT_TEMPLATE]
