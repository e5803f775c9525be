"""The distribution that is sampled and verified, its draws, and random numbers that belong to one request alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from farm.decode.sampling import (
    ACCEPT,
    DRAFT,
    NEXT,
    SamplingBatch,
    SamplingParams,
    distribution,
    draw,
    uniform,
)


def batch(*params: SamplingParams) -> SamplingBatch:
    return SamplingBatch.of(params, [0] * len(params))


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def test_temperature_divides_logits_and_zero_is_the_argmax() -> None:
    hot = distribution(LOGITS, batch(SamplingParams(temperature=0.5)))
    torch.testing.assert_close(hot, (LOGITS / 0.5).softmax(-1))
    greedy = distribution(LOGITS, batch(SamplingParams()))
    assert greedy.tolist() == [[1.0, 0.0, 0.0, 0.0]]


def test_top_k_and_top_p_keep_the_likeliest_and_renormalise() -> None:
    p = LOGITS.softmax(-1)[0]
    top2 = distribution(LOGITS, batch(SamplingParams(temperature=1.0, top_k=2)))[0]
    torch.testing.assert_close(top2, torch.tensor([p[0], p[1], 0, 0]) / (p[0] + p[1]))
    # The smallest set that reaches top_p: the first token has 0.64, so 0.7 needs the second as well.
    nucleus = distribution(LOGITS, batch(SamplingParams(temperature=1.0, top_p=0.7)))[0]
    torch.testing.assert_close(nucleus, top2)
    one = distribution(LOGITS, batch(SamplingParams(temperature=1.0, top_p=1e-50)))[0]
    assert one.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_requests_of_one_batch_keep_their_own_settings() -> None:
    mixed = batch(
        SamplingParams(), SamplingParams(temperature=1.0, top_k=1), SamplingParams(temperature=2.0, top_p=0.9)
    )
    rows = distribution(LOGITS.expand(3, 4), mixed)
    for index, params in enumerate((SamplingParams(), SamplingParams(temperature=1.0, top_k=1))):
        torch.testing.assert_close(rows[index], distribution(LOGITS, batch(params))[0])
    alone = distribution(LOGITS, batch(SamplingParams(temperature=2.0, top_p=0.9)))[0]
    torch.testing.assert_close(rows[2], alone)


@given(
    weights=st.lists(st.sampled_from([0.0, 1e-30, 0.1, 1.0, 7.0]), min_size=1, max_size=6).filter(any),
    u=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2**-53])),
)
def test_a_token_of_probability_zero_is_never_drawn(weights: list[float], u: float) -> None:
    token = int(draw(torch.tensor([weights]), torch.tensor([u], dtype=torch.float64)))
    assert weights[token] > 0


def filtered_by_definition(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """One row, fp64: sort, keep the first k, the smallest set whose share reaches top_p, of it what min_p allows."""
    p, order = (logits.double() / params.temperature).softmax(-1).sort(descending=True, stable=True)
    if params.top_k:
        p[params.top_k :] = 0
    p /= p.sum()
    kept = p.cumsum(-1) - p < params.top_p if params.top_p < 1 else p > 0
    kept[0] = True
    p = torch.where(kept & (p >= params.min_p * p[0]), p, 0)
    return torch.zeros_like(p).scatter_(-1, order, p / p.sum())


@given(
    seed=st.integers(0, 1000),
    sharp=st.sampled_from([0.0, 0.5, 3.0]),
    settings_of=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 5, 300, 2000]),
            st.sampled_from([1.0, 0.999, 0.9, 0.3]),
            st.sampled_from([0, 0.1]),
        ),
        min_size=1,
    ),
)
@settings(max_examples=40)
def test_a_large_vocabulary_is_filtered_by_definition(
    seed: int, sharp: float, settings_of: list[tuple[int, float, float]]
) -> None:
    """Rows that a few large logits decide, and rows that need the whole sort, side by side."""
    logits = torch.randn(len(settings_of), 1000, generator=torch.Generator().manual_seed(seed)) * sharp
    logits += torch.linspace(0, 1e-3, 1000)  # no ties: which of two equal tokens stays is nobody's business
    params = [SamplingParams(0.8, top_p, top_k, min_p=min_p) for top_k, top_p, min_p in settings_of]
    rows = distribution(logits, batch(*params))
    for row, logit, param in zip(rows, logits, params, strict=True):
        expected = filtered_by_definition(logit, param)
        # At the edge of the nucleus float32 may decide the other way for one token.
        different = ((row > 0) != (expected > 0)).sum()
        assert different <= 1
        torch.testing.assert_close(
            row.double(), expected, atol=float(2e-6 + different * expected.max()), rtol=1e-3
        )


def test_draws_follow_the_weights() -> None:
    u = torch.linspace(0, 1, 10_001, dtype=torch.float64)[:-1]
    counts = torch.bincount(draw(torch.tensor([[1.0, 0.0, 3.0]]).expand(10_000, 3), u), minlength=3)
    assert counts.tolist() == [2500, 0, 7500]


def test_uniform_numbers_are_uniform_and_every_counter_matters() -> None:
    seeds = torch.arange(20_000)
    zeros = torch.zeros_like(seeds)
    base = uniform(seeds, zeros, 0, DRAFT)
    assert kstest(base.numpy(), "uniform").pvalue > 1e-3
    others = [
        uniform(seeds, zeros + 1, 0, DRAFT),
        uniform(seeds, zeros, 1, DRAFT),
        uniform(seeds, zeros, 0, ACCEPT),
        uniform(seeds, zeros, 0, NEXT),
        uniform(seeds + 1, zeros, 0, DRAFT),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack((base, other)))[0, 1]
        assert abs(float(correlation)) < 0.03  # over 4 sigma of 20,000 independent pairs
    assert torch.equal(base, uniform(seeds, zeros, 0, DRAFT))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_settings_without_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="has to be"):
        SamplingParams(**wrong)  # type: ignore[arg-type]


def test_what_is_no_distribution_draws_a_token_of_the_vocabulary() -> None:
    """Kernels read an embedding at whatever is drawn."""
    p_BV = torch.tensor([[torch.nan] * 4, [0.5, torch.nan, 0.5, 0.0], [0.0] * 4, [torch.inf, 1.0, 0.0, 0.0]])
    for u in (0.0, 0.5, 1 - 2**-53):
        drawn_B = draw(p_BV, torch.full((4,), u, dtype=torch.float64))
        assert ((drawn_B >= 0) & (drawn_B < 4)).all()
