"""Experts routed by row must give every row what its own expert gives it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from farm.draft.expert import Expert
from farm.draft.routed import ExpertStack, FlatExpert, RoutedExperts

WIDTHS = (6, 10, 3)


def experts() -> list[Expert]:
    torch.manual_seed(0)
    return [Expert(8, width).double().requires_grad_(False) for width in WIDTHS]


def stack() -> ExpertStack:
    return ExpertStack([FlatExpert.of(expert, max(WIDTHS)) for expert in experts()])


@given(which=st.lists(st.integers(0, 2), min_size=1, max_size=7), num_tokens=st.integers(1, 3))
def test_every_row_gets_its_own_expert_whatever_the_mixture_and_the_widths(
    which: list[int], num_tokens: int
) -> None:
    generator = torch.Generator().manual_seed(len(which))
    size = (2, len(which) * num_tokens, 8)
    residual, normed = torch.randn(size, generator=generator, dtype=torch.float64)
    got = RoutedExperts.of(stack(), which).add_to(residual, normed)
    every = [expert(normed) for expert in experts()]
    rows = [expert for expert in which for _ in range(num_tokens)]
    expected = torch.stack([residual[m] + every[expert][m] for m, expert in enumerate(rows)])
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_rows", [1, 8])
def test_the_work_grows_with_the_experts_present_and_their_largest_group(num_rows: int) -> None:
    routed = RoutedExperts.of(stack(), [0] * num_rows + [1, 2])
    places = routed.num_rows if routed.gather_N is None else len(routed.gather_N)
    assert places == len(WIDTHS) * num_rows
