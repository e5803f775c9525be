"""A target without prompts makes up its own before the plan, once; the dry run says how many and from what."""

from pathlib import Path

import pytest

from farm.artifacts import Artifacts
from farm.config import Manifest
from farm.data.chat import TEXT_TEMPLATE
from farm.evaluate.templates import with_templates
from farm.fleet.elicit import elicit_prompts, elicitation_lines
from farm.fleet.plan import make_plan
from farm.sections import TargetSpec
from farm.store import open_store
from farm.target import zoo
from farm.target.load import target_digest
from tests.farm.models import talkative


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """One target with a chat template, one without, one that cannot be read."""
    tokenizer = zoo.train_tokenizer()
    zoo.save(talkative(tokenizer), tokenizer, tmp_path / "chat")
    tokenizer.chat_template = None
    zoo.save(talkative(tokenizer), tokenizer, tmp_path / "text")
    names = ("chat", "text", "absent")
    return Manifest(
        base=str(tmp_path / "chat"),
        store=(tmp_path / "store").as_uri(),
        targets=tuple(TargetSpec(name=name, model=str(tmp_path / name)) for name in names),
        elicit={"prompts": 10, "max_new_tokens": 60},
        evaluate={"prompts": 3},
    )


@pytest.mark.ray
def test_made_up_prompts_are_planned_as_given_ones_and_made_once(
    ray_cluster: object, manifest: Manifest
) -> None:
    manifest = with_templates(manifest)
    assert [target.chat_template for target in manifest.targets] == [None, TEXT_TEMPLATE, None]
    artifacts, said = Artifacts(open_store(manifest.store)), list[str]()
    assert elicitation_lines(manifest, artifacts, target_digest) == [
        "chat: no prompts given: 10 will be sampled from its chat template",
        "text: no prompts given: 10 will be sampled from its BOS token, as it has no chat template",
    ]
    before = make_plan(manifest, artifacts, target_digest, stand_in=True)
    assert [len(target.answers.prompts) for target in before.targets] == [7, 7]
    assert set(make_plan(manifest, artifacts, target_digest).refused) == {"chat", "text", "absent"}

    assert elicit_prompts(manifest, artifacts, target_digest, said.append) == {}

    plan = make_plan(manifest, artifacts, target_digest)
    assert set(plan.refused) == {"absent"}
    for target in plan.targets:
        assert (len(target.answers.prompts), len(target.held_out)) == (7, 3)
        texts = [prompt.messages[0]["content"] for prompt in (*target.answers.prompts, *target.held_out)]
        assert len(set(texts)) == 10
        assert target.answers.source["prompts_key"]  # named, so that cleaning up keeps them
    assert "10 prompts from its chat template; rejected: " in said[2] + said[3]
    said.clear()
    assert elicit_prompts(manifest, artifacts, target_digest, said.append) == {}
    assert said == []
    assert "10 prompts from its chat template" in elicitation_lines(manifest, artifacts, target_digest)[0]
