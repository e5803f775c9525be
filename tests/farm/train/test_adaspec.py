"""The filter keeps the share it is told, the largest differences, whatever ranks and batches they lie in."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from farm.train.adaspec import LIMIT, NUM_BINS, histogram, keep_at, kept, threshold

BIN = 2 * LIMIT / NUM_BINS
seeds = st.integers(0, 2**31)
keeps = st.floats(0.05, 1.0)


def deltas(seed: int, count: int = 3000) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 1.5


@given(seeds, keeps)
def test_the_share_that_is_kept_is_the_one_asked_for(seed: int, keep: float) -> None:
    delta = deltas(seed)
    found = kept(delta, torch.arange(len(delta)), threshold(histogram(delta), keep))
    assert abs(float(found.float().mean()) - keep) < 0.01


@given(seeds, keeps)
def test_nothing_that_is_left_out_is_larger_than_what_is_kept_by_more_than_a_bin(
    seed: int, keep: float
) -> None:
    delta = deltas(seed)
    found = kept(delta, torch.arange(len(delta)), threshold(histogram(delta), keep))
    if found.any() and not found.all():
        assert delta[~found].max() <= delta[found].min() + BIN + 1e-6


@given(seeds, st.permutations(range(40)), st.lists(st.integers(1, 39), min_size=1, max_size=4))
def test_the_kept_positions_are_the_same_however_ranks_share_them_out(
    seed: int, order: list[int], cuts: list[int]
) -> None:
    delta, uid = deltas(seed, 40), torch.arange(40)
    whole = kept(delta, uid, threshold(histogram(delta), 0.4))
    shuffled = torch.tensor(order)
    edges = [0, *sorted(set(cuts)), 40]
    parts = [shuffled[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    shared = threshold(torch.stack([histogram(delta[part]) for part in parts]).sum(0), 0.4)
    for part in parts:
        assert torch.equal(kept(delta[part], uid[part], shared), whole[part])


def test_a_batch_that_has_nothing_to_teach_keeps_nothing_beside_one_that_has() -> None:
    """The quantile of each micro-batch, as in AdaSPEC's code, keeps four tenths of both."""
    easy, hard = deltas(1, 1000) * 0.01 - 4, deltas(2, 1000) * 0.01 + 4
    found = threshold(histogram(easy) + histogram(hard), 0.4)
    uid = torch.arange(2000)
    assert float(kept(easy, uid[:1000], found).float().mean()) == 0.0
    assert abs(float(kept(hard, uid[1000:], found).float().mean()) - 0.8) < 0.05
    local = kept(easy, uid[:1000], threshold(histogram(easy), 0.4))
    assert float(local.float().mean()) > 0.35


def test_ties_are_kept_at_the_share_by_what_they_are_not_by_where_they_stand() -> None:
    delta, uid = torch.zeros(5000), torch.arange(5000) * 1_048_576 + 7
    found = kept(delta, uid, threshold(histogram(delta), 0.4))
    assert abs(float(found.float().mean()) - 0.4) < 0.03
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept(delta[order], uid[order], threshold(histogram(delta[order]), 0.4)), found[order])
    assert kept(delta, uid, threshold(histogram(delta), 1.0)).all()


def test_what_is_not_finite_is_neither_counted_nor_kept() -> None:
    delta = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0, 2.0])
    counts = histogram(delta)
    assert int(counts.sum()) == 2
    assert kept(delta, torch.arange(5), threshold(counts, 1.0)).tolist() == [False, False, False, True, True]
    nothing = threshold(histogram(delta[:1]), 0.5)
    assert not kept(delta[:1], torch.arange(1), nothing).any()


def test_everything_is_kept_until_the_filter_warms_up() -> None:
    shares = [keep_at(0.4, 0.1, progress) for progress in (0.0, 0.1, 0.15, 0.2, 1.0)]
    assert [round(share, 6) for share in shares] == [1.0, 1.0, 0.7, 0.4, 0.4]
    assert keep_at(0.4, 0.0, 0.0) == 0.4
