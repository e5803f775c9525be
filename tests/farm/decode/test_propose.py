"""Chains against the draft's own forward along them, and what a control is told about a draft's distributions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from farm.decode.control import Fixed, Signal
from farm.decode.controls import make_control
from farm.decode.engine import Engine, Request, Route
from farm.decode.penalties import Penalties, Said
from farm.decode.propose import chain_reader, propose
from farm.decode.sampling import SamplingParams, distribution
from farm.decode.tree import TreeShape
from tests.farm.decode.penalised import penalise
from tests.farm.decode.test_engine import NO_STOP, decode, prompts, tiny_pair
from tests.farm.decode.test_propose_tree import VOCABULARY, World, batch_of


class Listens(Fixed):
    """Drafts always the same length and keeps what it is told."""

    def __init__(self, signal: Signal) -> None:
        super().__init__(1)
        self.signal = signal
        self.heard: list[list[float]] = []

    def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:
        self.heard.append(list(signal_B))
        return super().keep(index, signal_B)


def heard(signal: Signal, *params: SamplingParams) -> list[float]:
    """The signals of the first round, a row each; every row has the same prompt."""
    target, draft = tiny_pair(seed=3)
    control = Listens(signal)
    engine = Engine(
        [Route(target, NO_STOP, draft)], num_slots=len(params), max_length=64, k=1, control=control
    )
    for row, one in enumerate(params):
        engine.add(Request(str(row), (1, 2, 3), one))
    engine.step()
    return control.heard[0]


@pytest.mark.parametrize("signal", ["entropy", "peak"])
def test_a_sampled_neighbour_does_not_hide_a_greedy_rows_uncertainty(signal: Signal) -> None:
    """The point mass that a greedy row proposes has entropy 0 and peak 1: it would never stop."""
    greedy, hot = SamplingParams(), SamplingParams(temperature=1.0, seed=7)
    (alone,) = heard(signal, greedy)
    beside, _ = heard(signal, greedy, hot)
    assert alone == pytest.approx(beside, rel=1e-5)
    assert (alone > 0.1) if signal == "entropy" else (alone < 0.9)


def test_a_sampled_rows_signal_is_of_the_distribution_it_is_drawn_from() -> None:
    """top_k = 1 leaves a point mass: no entropy."""
    (entropy,) = heard("entropy", SamplingParams(temperature=1.0, top_k=1))
    assert entropy == pytest.approx(0.0, abs=1e-6)


TREES = {kind: TreeShape(kind, width=2, depth=2, num_nodes=4) for kind in ("top-k", "sampled")}


@pytest.mark.parametrize("how", ["fixed", "adaedl", "cost", *TREES])
@pytest.mark.parametrize("pruned", [False, True])
def test_an_expert_that_says_no_numbers_changes_no_token(how: str, pruned: bool) -> None:
    """A row draws nothing from what is no distribution; with nothing drafted it has the luck of plain decoding."""
    target, draft = tiny_pair(seed=2)
    draft.trunk.vocabulary_C = torch.arange(0, 32, 2) if pruned else None
    for parameter in draft.expert.parameters():
        parameter.fill_(torch.nan)
    requests = [
        Request(str(i), ids, SamplingParams(temperature=temperature, seed=i, max_new_tokens=12))
        for i, (ids, temperature) in enumerate(zip(prompts(3, 4), (1.0, 0.0, 0.7), strict=True))
    ]
    options = {"tree": TREES[how]} if how in TREES else {"control": make_control(how, 3)}
    broken = decode(target, draft, requests, **options)
    assert [done.tokens for done in broken] == [done.tokens for done in decode(target, None, requests)]
    assert sum(broken[0].stats.reached) == 0


PENALTIES: dict[str, float] = {"repetition_penalty": 1.5, "presence_penalty": 0.3, "frequency_penalty": 0.7}


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("temperatures", [(60.0, 99.0, 40.0), (60.0, 0.0, 99.0), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("penalties", [{}, PENALTIES], ids=["plain", "penalised"])
def test_each_drafted_token_comes_from_the_drafts_distribution_after_those_before_it(
    penalties: dict[str, float], temperatures: tuple[float, ...], pruned: bool
) -> None:
    """Penalties count what was drafted, as they will in the verification; q is the distribution that was drawn from.

    The draft's logits differ by hundreds: temperatures are as high, or what was drafted would have no say in any q.
    """
    world, limits, said = World(VOCABULARY if pruned else None), (3, 3, 2), Said([4, 9, 9], 1)
    params = [
        SamplingParams(temperature=temperature, seed=seed, **penalties)
        for seed, temperature in enumerate(temperatures)
    ]
    batch = batch_of(*params, penalties=Penalties.of(params, [said] * 3))
    cache = world.cache()
    reader = chain_reader(world.draft, world.head, world.pending(cache, limits), cache, 2)
    chain = propose(reader, 3, Fixed(3), batch)
    assert chain.lengths == limits
    assert chain.forwards == 3
    for row, (one, length) in enumerate(zip(params, limits, strict=True)):
        tokens = tuple(chain.tokens_BK[row, :length].tolist())
        for index, token in enumerate(tokens):
            path = tokens[:index]
            logits = world.logits(row, path).float()
            logits = penalise(logits, one, Said([*said.tokens, *path], 1), world.vocabulary_C)
            q_C = distribution(logits[None], batch_of(one))[0]
            q_V = (
                q_C if world.vocabulary_C is None else torch.zeros(32).index_copy(0, world.vocabulary_C, q_C)
            )
            assert q_V[token] > 0
            if chain.q_BKV is not None:
                torch.testing.assert_close(chain.q_BKV[row, index], q_V, atol=1e-6, rtol=0)
