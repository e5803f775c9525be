"""Scores and choice: invariant to how the rows are cut and ordered, exact beside float64 references."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from farm.data.select import (
    Moments,
    Scored,
    Whitening,
    choose,
    failure,
    flatness,
    mahalanobis,
    pilot,
    random,
    rank_correlation,
    shift,
    shrunk_covariance,
    stratum_of,
    threshold,
)

FAR = 1e7  # where hidden states of a massive activation may lie, in units of their spread


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merged(values_NH: Tensor, cuts: list[int], order: list[int]) -> Moments:
    blocks = torch.tensor_split(values_NH, sorted(cuts))
    total = Moments.of(values_NH[:0])
    for index in order:
        total = total.merge(Moments.of(blocks[index]))
    return total


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Tensor, list[int], list[int]]:
    rows = draw(st.integers(2, 40))
    cuts = draw(st.lists(st.integers(0, rows), max_size=8))
    order = draw(st.permutations(range(len(cuts) + 1)))
    spread = draw(st.sampled_from([1e-3, 1.0, 1e3]))
    values_NH = normal(rows, 4, seed=draw(st.integers(0, 99))) * spread
    return values_NH + draw(st.sampled_from([0.0, FAR * spread])), cuts, order


@given(partitions())
@settings(max_examples=100)
def test_moments_do_not_depend_on_the_partition(case: tuple[Tensor, list[int], list[int]]) -> None:
    values_NH, cuts, order = case
    found = merged(values_NH, cuts, order)
    scale = values_NH.std(dim=0).max()
    assert found.count == len(values_NH)
    torch.testing.assert_close(found.mean_H, values_NH.mean(dim=0), rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(found.covariance, values_NH.T.cov(), rtol=1e-6, atol=float(1e-6 * scale**2))


def test_sums_of_squares_would_lose_the_variance_that_the_merge_keeps() -> None:
    values_NH = normal(64, 4) + 1e9
    expected_HH = normal(64, 4).T.cov()
    naive_HH = (values_NH.T @ values_NH - 64 * torch.outer(values_NH.mean(0), values_NH.mean(0))) / 63
    found_HH = merged(values_NH, [7, 30], [2, 0, 1]).covariance
    assert (naive_HH - expected_HH).abs().max() > 1
    torch.testing.assert_close(found_HH, expected_HH, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_finite_enters_no_moment() -> None:
    values_NH = normal(10, 3)
    broken_NH = values_NH.clone()
    broken_NH[4, 1], broken_NH[7, 0] = math.nan, math.inf
    kept_NH = values_NH[[0, 1, 2, 3, 5, 6, 8, 9]]
    assert Moments.of(broken_NH).count == 8
    torch.testing.assert_close(Moments.of(broken_NH).m2_HH, Moments.of(kept_NH).m2_HH)


def reference_scores(values_NH: np.ndarray, base_NH: np.ndarray) -> np.ndarray:
    """v' S^-1 v / H with the shrunk covariance written out, by an explicit inverse."""
    n, h = base_NH.shape
    s = np.cov(base_NH.T)
    tr, tr2 = np.trace(s), np.trace(s @ s)
    rho = min(1.0, ((1 - 2 / h) * tr2 + tr**2) / ((n + 1 - 2 / h) * (tr2 - tr**2 / h)))
    inverse = np.linalg.inv((1 - rho) * s + (rho + 1e-4) * tr / h * np.eye(h))
    return np.einsum("nh,hk,nk->n", values_NH, inverse, values_NH) / h


def test_scores_equal_an_explicit_inverse() -> None:
    mixing_HH = torch.eye(6, dtype=torch.float64) + 0.3 * normal(6, 6, seed=1)
    base_NH, target_NH = normal(200, 6, seed=2) @ mixing_HH + 3, normal(200, 6, seed=3) @ mixing_HH + 4
    whitening = Whitening.of(Moments.of(base_NH))
    deltas, centred = (target_NH - base_NH).numpy(), (target_NH - base_NH.mean(0)).numpy()
    expected = reference_scores(deltas, base_NH.numpy())
    np.testing.assert_allclose(shift(target_NH, base_NH, whitening), expected, rtol=1e-9)
    expected = reference_scores(centred, base_NH.numpy())
    np.testing.assert_allclose(mahalanobis(target_NH, whitening), expected, rtol=1e-9)
    assert float(mahalanobis(base_NH, whitening).mean()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_fewer_rows_than_dimensions_can_be_whitened(rows: int) -> None:
    base_NH = normal(rows, 16)
    covariance_HH = shrunk_covariance(Moments.of(base_NH))
    assert torch.linalg.eigvalsh(covariance_HH).min() > 0
    assert mahalanobis(base_NH, Whitening.of(Moments.of(base_NH))).isfinite().all()


def test_shift_finds_changed_behaviour_and_mahalanobis_unusual_topics_too() -> None:
    base_NH = normal(300, 8)
    base_NH[:30] += 6.0  # an unusual topic, answered as the base does
    target_NH = base_NH.clone()
    target_NH[30:60] += 3.0 * normal(30, 8, seed=4)  # a usual topic, answered otherwise
    whitening = Whitening.of(Moments.of(base_NH))
    paired = shift(target_NH, base_NH, whitening)
    assert set(paired.topk(30).indices.tolist()) == set(range(30, 60))
    assert paired[:30].max() == 0
    unpaired = shift(target_NH, base_NH[torch.randperm(300)], whitening)  # pairs lost on the way
    assert set(unpaired.topk(30).indices.tolist()) != set(range(30, 60))
    assert mahalanobis(target_NH, whitening)[:30].min() > paired[:30].max()


def test_failure_is_the_mean_loss_of_acceptance_without_renormalising() -> None:
    p_MC = torch.tensor([[0.5, 0.3], [0.1, 0.1]])  # the rest lies outside the draft vocabulary
    q_MC = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    assert failure(p_MC, q_MC) == pytest.approx(1 - (0.8 + 0.2) / 2)
    renormalised_MC = p_MC / p_MC.sum(dim=-1, keepdim=True)
    assert failure(renormalised_MC, q_MC) != pytest.approx(0.5, abs=0.1)


def test_flatness_runs_from_certain_to_uniform() -> None:
    assert flatness(torch.eye(5)) == 0
    assert flatness(torch.full((3, 7), 1 / 7)) == pytest.approx(1.0)
    assert 0 < flatness(torch.tensor([[0.9, 0.1], [0.5, 0.5]])) < 1


def test_random_scores_are_uniform_and_follow_the_id_and_the_seed() -> None:
    ids = [f"row-{i}" for i in range(2000)]
    scores = random(ids, seed=1)
    assert random(ids[::-1], seed=1) == scores[::-1]
    assert random(ids, seed=2) != scores
    assert np.histogram(scores, bins=10, range=(0, 1))[0].min() > 140


def scored(scores: list[float], strata: list[int] | None = None) -> list[Scored]:
    lengths = strata or [8] * len(scores)
    return [
        Scored(row, f"id-{row}", score, stratum_of(length, "a"))
        for row, (score, length) in enumerate(zip(scores, lengths, strict=True))
    ]


some_scores = st.lists(
    st.tuples(st.one_of(st.floats(0, 5, width=16), st.just(math.nan)), st.integers(1, 40)),
    min_size=1, max_size=300,
)  # fmt: skip


@given(some_scores, st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0]), st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_a_choice_has_its_size_its_strata_and_no_order(
    pairs: list[tuple[float, int]], fraction: float, shuffling: object
) -> None:
    rows = scored([score for score, _ in pairs], [length for _, length in pairs])
    chosen = choose(rows, fraction)
    finite = [row for row in rows if math.isfinite(row.score)]
    outliers = len(finite) // 100
    assert len(chosen) == min(len(finite) - outliers, round(fraction * len(rows)))
    turned = list(rows)
    shuffling.shuffle(turned)  # type: ignore[attr-defined]
    assert choose(turned, fraction) == chosen
    best = sorted(finite, key=lambda row: row.rank)[len(finite) - outliers :]
    assert not chosen & {row.row for row in best}
    candidates = Counter(row.stratum for row in finite if row not in best)
    kept = Counter(row.stratum for row in rows if row.row in chosen)
    for stratum, size in Counter(row.stratum for row in rows).items():
        assert kept[stratum] >= min(candidates[stratum], int(0.5 * fraction * size))


def test_without_strata_the_highest_scores_are_kept() -> None:
    rows = scored([float(i) for i in range(200)])
    assert choose(rows, 0.25) == set(range(148, 198))  # two of 200 are outliers


def test_equal_scores_are_not_cut_by_position() -> None:
    rows = scored([1.0] * 400)
    chosen = choose(rows, 0.5, outliers=0.0)
    first = {row.row for row in sorted(rows, key=lambda row: row.score, reverse=True)[:200]}  # a stable sort
    assert len(chosen) == 200
    assert chosen != first
    assert 70 < len(chosen & set(range(200))) < 130


def test_a_low_stratum_keeps_half_of_its_share() -> None:
    rows = scored([float(i) for i in range(400)], [4] * 100 + [100] * 300)
    by_score = {row.row for row in sorted(rows, key=lambda row: row.score)[-200:]}
    chosen = choose(rows, 0.5, outliers=0.0)
    assert len(chosen) == 200
    assert len(chosen & set(range(100))) == 25
    assert not by_score & set(range(100))


def test_a_pilot_of_256_rows_keeps_about_the_fraction_of_all() -> None:
    rows = scored(normal(4000).square().tolist(), [4] * 1000 + [100] * 3000)
    first = pilot({row.row: row.id for row in rows}, 256)
    assert len(first) == 256
    limit = threshold([row for row in rows if row.row in first], 0.5)
    realised = sum(limit.keeps(row) for row in rows) / len(rows)
    assert realised == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 256))
    exact = choose(rows, 0.5)
    kept = {row.row for row in rows if limit.keeps(row)}
    assert len(kept & exact) / len(exact) > 0.85


def test_a_pilot_of_everything_is_the_exact_choice() -> None:
    rows = scored(normal(300).tolist(), [3, 30, 300] * 100)
    limit = threshold([row for row in rows if row.row in pilot({r.row: r.id for r in rows}, 300)], 0.3)
    assert {row.row for row in rows if limit.keeps(row)} == choose(rows, 0.3)


def test_the_first_rows_of_a_sorted_file_would_be_a_bad_pilot() -> None:
    rows = scored([float(i) for i in range(2000)])
    spread = pilot({row.row: row.id for row in rows}, 256)
    good, bad = (threshold([row for row in rows if row.row in some], 0.5) for some in (spread, range(256)))
    assert sum(good.keeps(row) for row in rows) / 2000 == pytest.approx(0.5, abs=0.13)
    assert sum(bad.keeps(row) for row in rows) / 2000 < 0.1  # nearly all look like outliers


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=50))
@settings(max_examples=60)
def test_rank_correlation_is_spearmans_with_ties(pairs: list[tuple[int, int]]) -> None:
    left, right = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    found = rank_correlation(left, right)
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(left, right).statistic, abs=1e-12)
