"""An engine host's own decisions, without Serve and without a store."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from farm.decode.drafting import longest_drafted
from farm.decode.engine import Route
from farm.decode.tree import TreeShape
from farm.draft.config import DraftConfig
from farm.draft.model import new_draft
from farm.sections import ServeSettings, TreeSettings
from farm.target.forward import TargetForward
from serve.records import Ask
from serve.replica import EngineHost
from tests.serve.family import tiny_model, tiny_tokenizer

LONG = 40_000  # more than drafts know
TREE = TreeSettings(width=2, depth=3, nodes=5)
ASK = Ask("cmpl-1", "a", (), (1,) * 50, {}, None, None, ())


def host(settings: ServeSettings, *, has_trunk: bool = True) -> Any:
    """One that hosts nothing yet."""
    made: Any = object.__new__(EngineHost.func_or_class)
    made._settings, made._has_trunk = settings, has_trunk
    return made


@pytest.fixture(scope="module")
def route() -> Route:
    """A target of many positions, with a draft."""
    model = tiny_model(tiny_tokenizer(), 0).eval()
    model.config.max_position_embeddings = LONG
    config = DraftConfig.for_base(LlamaConfig.from_dict(model.config.to_dict()))
    return Route(TargetForward.of(model), frozenset(), new_draft(config, seed=1), target="a")


@pytest.mark.parametrize("tree", [None, TREE])
def test_an_engine_takes_no_sequence_that_is_longer_than_its_drafts_can_follow(route, tree):
    """Else it could not be made, on the thread of all engines: the replica would die as often as it is started."""
    settings = ServeSettings(num_slots=1, max_length=LONG, k=3, tree=tree, control="fixed")
    drafted = 3 if tree is None else TreeShape.of(TREE).num_entries
    engine = host(settings)._new_engine(route)
    assert engine.scheduler.max_length == longest_drafted(drafted)
    plain = host(settings, has_trunk=False)._new_engine(replace(route, draft=None))
    assert plain.scheduler.max_length == LONG


@pytest.mark.parametrize(("prompt", "messages", "param"), [
    ((1,) * 50, (), "prompt"), ("x" * 50, (), "prompt"), ("", ({"role": "user", "content": "x" * 50},), "messages"),
])  # fmt: skip
def test_a_prompt_without_room_for_an_answer_is_refused_by_the_name_of_its_field(prompt, messages, param):
    tokenizer = tiny_tokenizer()
    target = SimpleNamespace(
        tokenizer=tokenizer, chat_template=tokenizer.chat_template, max_positions=20,
        forward=SimpleNamespace(vocab_size=len(tokenizer)),
    )  # fmt: skip
    ask = replace(ASK, prompt=prompt, messages=messages, sampling={"logit_bias": (), "logprobs": None})
    refused = asyncio.run(host(ServeSettings())._checked(target, ask))
    assert (refused.code, refused.param) == ("context_length_exceeded", param)


def test_a_limit_of_chains_is_refused_by_its_name_where_trees_are_drafted():
    target = SimpleNamespace(forward=SimpleNamespace(vocab_size=320))
    ask = replace(ASK, sampling={"logit_bias": (), "logprobs": None, "max_drafted": 2})
    trees = host(ServeSettings(tree=TREE, control="fixed"))
    refused = asyncio.run(trees._checked(target, ask))
    assert (refused.status, refused.param) == (400, "max_drafted")
