"""Penalties and bias by their definitions, and seen by a drafted position exactly as by plain decoding."""

from typing import Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from farm.decode.controls import make_control
from farm.decode.engine import Engine, Request, Route
from farm.decode.penalties import Penalties, Said
from farm.decode.sampling import SamplingBatch, SamplingParams, distribution
from farm.target.forward import TargetForward
from tests.farm.models import tiny_model, tiny_pair

SAID = Said([1, 2, 2, 5, 5, 5, 7], num_prompt=3)
OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"logit_bias": ((3, 5.0), (9, -100.0))},
    {"repetition_penalty": 0.8, "frequency_penalty": -0.5, "logit_bias": ((1, -2.0),)},
]


def applied(params: SamplingParams, logits: torch.Tensor, drafted: list[int] | None = None) -> torch.Tensor:
    penalties = Penalties.of([params], [SAID])
    assert penalties is not None
    return penalties.apply(logits[None, None], [drafted or []], first=len(drafted or []))[0, 0]


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(16, generator=torch.Generator().manual_seed(0))
    expected = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([SAID.tokens]), logits[None].clone())[0]
    torch.testing.assert_close(applied(SamplingParams(repetition_penalty=1.4), logits), expected)


def test_presence_and_frequency_look_at_the_answer_alone() -> None:
    got = applied(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), torch.zeros(9))
    assert got[5] == -0.5 - 3 * 0.25
    assert got[7] == -0.5 - 0.25
    assert got[2] == 0.0  # it stands in the prompt only


def test_bias_is_added_and_drafted_tokens_count_as_said() -> None:
    got = applied(
        SamplingParams(frequency_penalty=1.0, logit_bias=((4, 2.5),)), torch.zeros(9), drafted=[8, 8]
    )
    assert (got[4], got[8], got[5]) == (2.5, -2.0, -3.0)


def test_a_draft_vocabulary_sees_the_same_values_in_its_own_columns() -> None:
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, logit_bias=((5, 1.0), (6, -1.0)))
    logits, vocabulary = (
        torch.randn(16, generator=torch.Generator().manual_seed(1)),
        torch.tensor([0, 5, 6, 11]),
    )
    penalties = Penalties.of([params], [SAID])
    assert penalties is not None
    pruned = penalties.apply(logits[vocabulary][None, None], [[]], vocabulary_C=vocabulary)[0, 0]
    torch.testing.assert_close(pruned, applied(params, logits)[vocabulary])


def test_rows_without_penalties_cost_nothing_and_stay_as_they_are() -> None:
    assert Penalties.of([SamplingParams(temperature=1.0)], [SAID]) is None
    penalties = Penalties.of([SamplingParams(), SamplingParams(presence_penalty=1.0)], [SAID, SAID])
    logits = torch.randn(2, 1, 9)
    assert penalties is not None
    assert torch.equal(penalties.apply(logits, [[], []])[0], logits[0])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("control", ["fixed-3", "cost"])
def test_greedy_speculation_with_penalties_is_plain_decoding_with_them(
    options: dict[str, Any], pruned: bool, control: str
) -> None:
    """In fp64; rows with and without penalties side by side."""
    target, draft = TargetForward.of(tiny_model().double()), tiny_pair()[1].double()
    draft.trunk.vocabulary_C = torch.arange(0, 32, 2) if pruned else None
    params = [SamplingParams(max_new_tokens=25, **options), SamplingParams(max_new_tokens=25)]
    requests = [Request(str(i), (1, 2, 3 + i), params[i % 2]) for i in range(4)]
    decoded = []
    for speculates in (False, True):
        engine = Engine(
            [Route(target, frozenset(), draft if speculates else None)],
            num_slots=3, max_length=64, k=3, control=make_control(control, 3),
        )  # fmt: skip
        decoded.append([done.tokens for done in engine.run(requests)])
    assert decoded[0] == decoded[1]
    assert decoded[0][0] != decoded[0][1]


def test_min_p_keeps_tokens_above_a_share_of_the_likeliest() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    batch = SamplingBatch.of([SamplingParams(temperature=1.0, min_p=0.25)], [0])
    expected = torch.tensor([[0.5, 0.3, 0.15, 0.0]]) / 0.95
    torch.testing.assert_close(distribution(logits, batch), expected)


def test_a_requests_own_stop_tokens_end_it_alone() -> None:
    target, _ = tiny_pair()
    free = Engine([Route(target, frozenset())], num_slots=2, max_length=64, k=0)
    plain = free.run([Request("a", (1, 2, 3), SamplingParams(max_new_tokens=12))])[0].tokens
    stop = plain[5]
    params = SamplingParams(max_new_tokens=12, stop_ids=frozenset({stop}))
    stopped, other = free.run(
        [Request("s", (1, 2, 3), params), Request("o", (1, 2, 3), SamplingParams(max_new_tokens=12))]
    )
    assert stopped.tokens == plain[: plain.index(stop) + 1]
    assert stopped.finish_reason == "stop"
    assert other.tokens == plain


@pytest.mark.parametrize(
    ("field", "value"), [("min_p", 1.5), ("repetition_penalty", 0.0), ("top_p", 0.0), ("temperature", -1.0)]
)
def test_a_setting_out_of_range_is_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]
