"""One threshold for all of a step's positions: how rows are cut into micro-batches decides nothing."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farm.train.filtering import Behind, learned

POSITIONS = (60, 45)  # of two unrolled steps


def steps(seed: int) -> list[Behind]:
    """Of two unrolled steps; later positions are further behind, so that micro-batches differ in kind."""
    generator = torch.Generator().manual_seed(seed)
    return [
        Behind(torch.randn(count, generator=generator) + torch.linspace(-2, 2, count), torch.arange(count))
        for count in POSITIONS
    ]


def cut(whole: list[Behind], cuts: list[int]) -> list[tuple[Behind, ...]]:
    edges = [0, *sorted(set(cuts)), max(POSITIONS)]
    return [tuple(Behind(one.delta_M[a:b], one.uid_M[a:b]) for one in whole) for a, b in pairwise(edges)]


@given(st.integers(0, 2**31), st.lists(st.integers(1, 44), max_size=5), st.floats(0.1, 1.0))
def test_positions_are_the_same_however_a_step_is_cut(seed: int, cuts: list[int], keep: float) -> None:
    whole, totals = steps(seed), torch.tensor(POSITIONS)
    (expected,) = learned([tuple(whole)], totals, keep, 1)
    parts = learned(cut(whole, cuts), totals, keep, 1)
    for step, of in enumerate(expected):
        kept_M = torch.cat([part[step].kept_M for part in parts])
        assert torch.equal(kept_M, of.kept_M)
        assert {int(part[step].num_kept) for part in parts} == {int(kept_M.sum())}
        assert {int(part[step].count) for part in parts} == {POSITIONS[step]}


def test_an_easy_micro_batch_beside_a_hard_one_keeps_next_to_nothing() -> None:
    whole = [Behind(torch.linspace(-2, 2, count), torch.arange(count)) for count in POSITIONS]
    easy, hard = learned(cut(whole, [30]), torch.tensor(POSITIONS), 0.4, 1)
    shares = [float(_share(part[0].kept_M)) for part in (easy, hard)]
    assert shares[0] == 0.0
    assert abs(shares[1] - 0.8) < 0.05


def _share(kept_M: Tensor | None) -> Tensor:
    assert kept_M is not None
    return kept_M.float().mean()
