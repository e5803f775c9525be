"""Held-out prompts of an evaluation: those that a target cannot take are left out, too few end it with a reason."""

from dataclasses import replace
from pathlib import Path

import pytest

from farm.config import Refused
from farm.data.prompts import Prompt, load_prompts
from farm.decode.drafting import longest_drafted
from farm.evaluate.target import EvaluateTask, encode_prompts, evaluate_target
from farm.sections import EvaluateSettings
from farm.target.load import load_target
from tests.farm.fleet.family import Family

# As Gemma's: a conversation begins with the user.
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ messages[0].content }}"
SHORT = EvaluateSettings(max_new_tokens=8)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


def prompts_of(family: Family) -> tuple[Prompt, ...]:
    return load_prompts(family.target("alpha").prompts).prompts


def test_a_prompt_that_the_template_refuses_costs_itself_alone(family: Family) -> None:
    first, second, *_ = prompts_of(family)
    refused = replace(first, messages=({"role": "system", "content": "Be brief."}, *first.messages))
    target = replace(load_target(family.target("alpha")), chat_template=STRICT)
    assert encode_prompts(target, [refused, second], SHORT) == encode_prompts(target, [second], SHORT)
    assert len(encode_prompts(target, [first, second], SHORT)) == 2


def test_a_template_that_takes_no_prompt_is_told_with_its_reason(family: Family) -> None:
    target = load_target(family.target("alpha"))
    target.tokenizer.chat_template = None
    with pytest.raises(Refused, match="alpha: none of its prompts.*the tokenizer has none; set the target's"):
        encode_prompts(target, prompts_of(family), SHORT)


def test_a_prompt_beyond_what_drafts_know_is_left_out_though_the_target_could_read_it(family: Family) -> None:
    target = replace(load_target(family.target("alpha")), max_positions=10**6, chat_template=STRICT)
    (first, *_), limit = prompts_of(family), longest_drafted(SHORT.k) - SHORT.max_new_tokens
    (ids,) = encode_prompts(target, [first], SHORT)
    long = replace(first, messages=({"role": "user", "content": first.messages[0]["content"] * limit},))
    assert len(ids) < limit
    assert encode_prompts(target, [long], SHORT) == []


@pytest.mark.parametrize(("adapted", "least"), [(None, 1), ("expert.safetensors", 2)])
def test_too_few_prompts_are_told_with_the_remedy_before_anything_is_measured(
    family: Family, adapted: str | None, least: int
) -> None:
    settings = EvaluateSettings(max_new_tokens=10**6)
    task = EvaluateTask(
        family.target("alpha"),
        settings,
        str(Path(family.trunk)),
        adapted,
        None,
        prompts_of(family),
        "float32",
    )
    with pytest.raises(
        Refused, match=f"0 leave room for evaluate.max_new_tokens 1000000, {least} are needed"
    ):
        evaluate_target(task)
