"""Exact enumeration: over all drafted chains and all accept / reject outcomes, the output is the target's distribution.

Invariants I2 and I4: the same enumeration must show a clear error for each known-bad verifier.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from farm.decode.verify import acceptance, next_distribution, prefix_length, verify_greedy, verify_sampled

V, K = 4, 2


@dataclass(frozen=True)
class World:
    """p and q after every prefix of up to K tokens; `raw` is p before temperature and truncation."""

    p: dict[tuple[int, ...], Tensor]
    q: dict[tuple[int, ...], Tensor]
    raw: dict[tuple[int, ...], Tensor]


def random_world(seed: int, *, sharp: float = 2.0, zeros: bool = False) -> World:
    generator = torch.Generator().manual_seed(seed)
    tables: list[dict[tuple[int, ...], Tensor]] = [{}, {}, {}]
    for length in range(K + 1):
        for prefix in itertools.product(range(V), repeat=length):
            logits = torch.randn(2, V, generator=generator, dtype=torch.float64) * sharp
            raw = logits[0].softmax(0)
            p = (logits[0] / 0.5).softmax(0)
            q = logits[1].softmax(0)
            if zeros:
                p = torch.where(p < 0.2 * p.max(), 0.0, p)
                q = torch.where(q < 0.2 * q.max(), 0.0, q)
                p, q = p / p.sum(), q / q.sum()
            tables[0][prefix], tables[1][prefix], tables[2][prefix] = p, q, raw
    return World(*tables)


Accept = Callable[[Tensor, Tensor, Tensor], Tensor]
Following = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Length = Callable[[Tensor, tuple[int, ...]], int]  # of a chain that was drawn from q [K, V]


def all_of_it(q: Tensor, chain: tuple[int, ...]) -> int:
    del q
    return len(chain)


def output_joint(
    world: World,
    accept: Accept = acceptance,
    following: Following = next_distribution,
    length: Length = all_of_it,
) -> Tensor:
    """Joint distribution of the first K + 1 tokens [V] * (K + 1): one round, then the target itself."""
    joint = torch.zeros((V,) * (K + 1), dtype=torch.float64)
    for chain in itertools.product(range(V), repeat=K):
        p = torch.stack([world.p[chain[:i]] for i in range(K + 1)])[None]
        q = torch.stack([world.q[chain[:i]] for i in range(K)])[None]
        drawn = torch.stack([q[0, i, chain[i]] for i in range(K)]).prod()
        if drawn == 0:
            continue
        ratio, drafted = accept(torch.tensor([chain]), p[:, :-1], q)[0], length(q[0], chain)
        for num in range(drafted + 1):
            outcome = drawn * ratio[:num].prod() * (1 - ratio[num] if num < drafted else 1.0)
            if outcome <= 0:
                continue
            follow = following(torch.tensor([num]), p, q, torch.tensor([drafted]))[0].double()
            for token in range(V):
                prefix = (*chain[:num], token)
                _extend(joint, world, prefix, outcome * follow[token] / follow.sum())
    return joint


def _extend(joint: Tensor, world: World, prefix: tuple[int, ...], probability: Tensor) -> None:
    if len(prefix) == K + 1:
        joint[prefix] += probability
        return
    for token in range(V):
        _extend(joint, world, (*prefix, token), probability * world.p[prefix][token])


def target_joint(world: World) -> Tensor:
    joint = torch.zeros((V,) * (K + 1), dtype=torch.float64)
    _extend(joint, world, (), torch.tensor(1.0, dtype=torch.float64))
    return joint


def total_variation(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().sum() / 2)


@given(seed=st.integers(0, 10_000), sharp=st.sampled_from([0.0, 0.5, 2.0, 30.0]), zeros=st.booleans())
@settings(max_examples=25)
def test_output_distribution_is_the_targets_exactly(seed: int, sharp: float, zeros: bool) -> None:
    world = random_world(seed, sharp=sharp, zeros=zeros)
    assert total_variation(output_joint(world), target_joint(world)) < 1e-12


def test_edges_of_p_and_q_are_exact() -> None:
    world = random_world(1)
    left = torch.tensor([0.7, 0.3, 0, 0], dtype=torch.float64)
    right = torch.tensor([0, 0, 0.4, 0.6], dtype=torch.float64)
    disjoint = World(dict.fromkeys(world.p, left), dict.fromkeys(world.q, right), world.raw)
    equal = World(world.p, world.p, world.raw)
    one_hot = World(dict.fromkeys(world.p, torch.eye(V).double()[2]), world.q, world.raw)
    above, just = (torch.tensor([x, 0.3, 0.4, 0.0], dtype=torch.float64) for x in (0.1 + 0.2, 0.3))
    rounded = World(
        dict.fromkeys(world.p, just), dict.fromkeys(world.q, above), world.raw
    )  # no residual is left
    for case in (disjoint, equal, one_hot, rounded):
        assert total_variation(output_joint(case), target_joint(case)) < 1e-12


def _raw_q(drafted: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return acceptance(drafted, p, (q**0.5) / (q**0.5).sum(-1, keepdim=True))


def _no_residual(num: Tensor, p: Tensor, q: Tensor, lengths: Tensor) -> Tensor:
    del q, lengths
    return p[torch.arange(len(num)), num]


def _always_accepts(drafted: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return torch.ones_like(acceptance(drafted, p, q))


@pytest.mark.parametrize(
    ("accept", "following"),
    [(_raw_q, next_distribution), (acceptance, _no_residual), (_always_accepts, next_distribution)],
    ids=["raw q", "no residual", "always accepts"],
)
def test_enumeration_rejects_known_bad_verifiers(accept: Accept, following: Following) -> None:
    world = random_world(5, sharp=0.7)
    assert total_variation(output_joint(world, accept, following), target_joint(world)) > 1e-2


def test_enumeration_rejects_a_bonus_token_from_unprocessed_logits() -> None:
    """The defect of the published EDA decoder: after a fully accepted path, temperature is forgotten."""
    world = random_world(5, sharp=0.7)

    def unprocessed_bonus(num: Tensor, p: Tensor, q: Tensor, lengths: Tensor) -> Tensor:
        out = next_distribution(num, p, q, lengths)
        return p[:, K].sqrt() if int(num[0]) == K else out

    assert total_variation(output_joint(world, acceptance, unprocessed_bonus), target_joint(world)) > 1e-2


def stops_by_entropy(q: Tensor, chain: tuple[int, ...]) -> int:
    """As AdaEDL: a position is drafted while its whole distribution is sure enough."""
    entropy = torch.special.entr(q).sum(dim=-1)
    return next((i for i in range(len(chain)) if entropy[i] > 1.0), len(chain))


def stops_by_peak_after_what_was_drawn(q: Tensor, chain: tuple[int, ...]) -> int:
    """What was drawn at position i may decide about i + 1."""
    return next((i for i in range(1, len(chain)) if q[i].max() < 0.6 or chain[i - 1] == 0), len(chain))


def drops_an_unlikely_draw(q: Tensor, chain: tuple[int, ...]) -> int:
    """Reads the probability of the drawn token: what is verified depends on what was drawn."""
    return next((i for i, token in enumerate(chain) if q[i, token] < 0.3), len(chain))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("length", [stops_by_entropy, stops_by_peak_after_what_was_drawn])
def test_a_length_chosen_by_whole_distributions_changes_nothing(length: Length, seed: int) -> None:
    world = random_world(seed, sharp=1.5)
    drafted = {length(torch.stack([world.q[()], world.q[(t,)]]), (t, 0)) for t in range(V)}
    assert min(drafted) < K
    assert total_variation(output_joint(world, length=length), target_joint(world)) < 1e-12


def test_enumeration_rejects_a_length_that_reads_the_probability_of_what_was_drawn() -> None:
    world = random_world(5, sharp=1.5)
    assert total_variation(output_joint(world, length=drops_an_unlikely_draw), target_joint(world)) > 1e-2


def test_padding_behind_a_short_row_is_never_accepted() -> None:
    lengths = [0, 1, 3]
    assert verify_greedy([[1, 2, 3]] * 3, [[1, 2, 3, 4]] * 3, lengths) == lengths
    drafted, p = torch.tensor([[1, 2, 3]] * 3), torch.full((3, 4, 4), 0.25)
    uniform = torch.full((3, 3), 0.5).double()
    verdict = verify_sampled(drafted, p, p[:, :3], uniform, uniform[:, 0], torch.tensor(lengths))
    assert verdict.num_accepted_B.tolist() == lengths


def test_verdict_follows_the_uniform_numbers() -> None:
    p = torch.tensor([[[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.25, 0.25, 0.25, 0.25]]])
    q = torch.tensor([[[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]])
    drafted = torch.tensor([[0, 2]])
    two = torch.tensor([2])
    low, high = torch.tensor([0.0]).double(), torch.tensor([0.9]).double()
    taken = verify_sampled(drafted, p, q, torch.tensor([[0.49, 0.99]]).double(), low, two)
    assert (taken.num_accepted_B.tolist(), taken.next_B.tolist()) == ([2], [0])
    refused = verify_sampled(drafted, p, q, torch.tensor([[0.5, 0.0]]).double(), high, two)
    assert (refused.num_accepted_B.tolist(), refused.next_B.tolist()) == ([0], [1])


def test_greedy_accepts_the_agreeing_prefix_only() -> None:
    assert verify_greedy([[1, 2, 3], [9, 2, 3], [1, 2, 9]], [[1, 2, 3, 4]] * 3, [3, 3, 3]) == [3, 0, 2]
    assert prefix_length(torch.tensor([[True, False, True]])).tolist() == [1]


def test_a_token_that_its_own_draft_could_not_draw_is_a_bug_not_a_rejection() -> None:
    p, q = torch.full((1, 1, 2), 0.5), torch.tensor([[[1.0, 0.0]]])
    with pytest.raises(AssertionError, match="probability 0"):
        acceptance(torch.tensor([[1]]), p, q)
