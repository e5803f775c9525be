"""Penalties and bias by their definitions, and seen by a drafted position exactly as by plain decoding."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from farm.decode.controls import make_control
from farm.decode.engine import Engine, Request, Route
from farm.decode.penalties import Penalties, Said
from farm.decode.sampling import SamplingBatch, SamplingParams, distribution
from farm.target.forward import TargetForward
from tests.farm.decode.penalised import penalise
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


IDS = st.lists(st.integers(0, 15), max_size=6)


@given(
    params=st.builds(
        SamplingParams,
        repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
        presence_penalty=st.sampled_from([0.0, -0.4, 0.7]),
        frequency_penalty=st.sampled_from([0.0, -0.3, 0.1]),
        logit_bias=st.lists(st.tuples(st.integers(0, 19), st.floats(-100, 100, width=32)), max_size=4).map(
            tuple
        ),
    ),
    prompt=IDS,
    rounds=st.lists(st.tuples(IDS, st.lists(IDS, min_size=1, max_size=5), st.booleans()), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
@settings(max_examples=300)
def test_counts_that_grow_give_the_bits_of_counting_everything_anew(
    params: SamplingParams,
    prompt: list[int],
    rounds: list[tuple[list[int], list[list[int]], bool]],
    dtype: torch.dtype,
    seed: int,
) -> None:
    """In each round tokens are said, and then paths are looked at, by a target or by a draft of few words."""
    generator, few = torch.Generator().manual_seed(seed), torch.tensor([1, 2, 3, 7, 12])
    tokens = list(prompt)
    penalties = Penalties({0: (params, Said(tokens, len(prompt)))})
    for new, paths, pruned in rounds:
        tokens += new
        vocabulary = few if pruned else None
        logits = torch.randn(1, len(paths), 5 if pruned else 16, generator=generator).to(dtype)
        logits[..., :2] = torch.tensor([0.0, -0.0])
        after = [Said([*tokens, *path], len(prompt)) for path in paths]
        expected = [penalise(logits[0, t].float(), params, said, vocabulary) for t, said in enumerate(after)]
        got = penalties.apply_to_paths(logits, {0: paths}, vocabulary)[0]
        assert torch.equal(got.view(torch.int32), torch.stack(expected).view(torch.int32))


class Listened(list[int]):
    """Tokens that remember how many of them were asked for."""

    asked = 0

    def __iter__(self) -> Iterator[int]:
        self.asked += len(self)
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.asked += len(found) if isinstance(index, slice) else 1
        return found


def test_a_long_request_is_counted_once_and_not_at_every_position() -> None:
    tokens = Listened([1, 2, 3] * 1000)
    params = SamplingParams(repetition_penalty=1.2, frequency_penalty=0.5)
    penalties = Penalties.of([params], [Said(tokens, 2000)])
    assert penalties is not None
    for _ in range(10):
        penalties.apply(torch.zeros(1, 5, 9), [[4, 5, 6, 7]])
        tokens += [8, 8]
    assert tokens.asked < 4000


def test_a_live_request_keeps_its_counts_from_round_to_round_and_takes_them_with_it() -> None:
    target, _ = tiny_pair()
    engine = Engine([Route(target, frozenset())], num_slots=2, max_length=64, k=0)
    engine.add(Request("a", (1, 2, 3), SamplingParams(presence_penalty=1.0, max_new_tokens=9)))
    engine.step()
    (live,) = engine.scheduler.live
    runner = engine.runner
    rounds = [runner._sampling_of([live], runner._batch_of([live])).penalties for _ in range(2)]
    (first, second) = (penalties.rows[0][1] for penalties in rounds if penalties is not None)
    assert first is second
    del live
    while engine.has_work:
        engine.step()
    assert len(engine.runner._said) == 0


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


@pytest.mark.parametrize("control", ["fixed-3", "adaedl-published"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_is_on_the_draft_too(control: str, temperature: float) -> None:
    """One that drowns everything else makes target and draft agree; without it most that is drafted is refused."""
    target, draft = tiny_pair()
    params = SamplingParams(temperature=temperature, max_new_tokens=1 + 6 * 4, logit_bias=((7, 1e3),))
    engine = Engine(
        [Route(target, frozenset(), draft)], num_slots=2, max_length=64, k=3, control=make_control(control, 3)
    )
    for done in engine.run([Request("a", (1, 2, 3), params), Request("b", (4, 5), params)]):
        assert done.tokens == (7,) * 25
        assert done.stats.tau == 4.0


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
