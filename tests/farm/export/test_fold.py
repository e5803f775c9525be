"""Shared and private expert as one: the same function, for any widths, and wrong folds are another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from farm.export.fold import GatedMlp, padded, side_by_side

H = 6
Fold = Callable[[GatedMlp, GatedMlp], GatedMlp]


def random_mlp(width: int, seed: int) -> GatedMlp:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return GatedMlp(draw(width, H), draw(width, H), draw(H, width))


def output(mlp: GatedMlp, x: Tensor) -> Tensor:
    return (functional.silu(x @ mlp.gate_FH.T) * (x @ mlp.up_FH.T)) @ mlp.down_HF.T


def error(fold: Fold, shared: GatedMlp, private: GatedMlp) -> float:
    x = random_mlp(16, 99).gate_FH
    return float((output(fold(shared, private), x) - output(shared, x) - output(private, x)).abs().max())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 8))
def test_the_fold_is_the_sum_for_any_widths_and_padding_changes_nothing(
    f: int, g: int, multiple: int
) -> None:
    shared, private = random_mlp(f, 1), random_mlp(g, 2)
    folded = padded(side_by_side(shared, private), multiple)
    assert folded.width % multiple == 0
    assert folded.width - multiple < f + g <= folded.width
    assert error(lambda *pair: padded(side_by_side(*pair), multiple), shared, private) < 1e-12


def down_swapped(shared: GatedMlp, private: GatedMlp) -> GatedMlp:
    return GatedMlp(*_rows(shared, private), torch.cat((private.down_HF, shared.down_HF), dim=1))


def gate_and_up_swapped(shared: GatedMlp, private: GatedMlp) -> GatedMlp:
    gate, up = _rows(shared, private)
    return GatedMlp(up, gate, side_by_side(shared, private).down_HF)


def weights_added(shared: GatedMlp, private: GatedMlp) -> GatedMlp:
    return GatedMlp(
        shared.gate_FH + private.gate_FH, shared.up_FH + private.up_FH, shared.down_HF + private.down_HF
    )


def _rows(shared: GatedMlp, private: GatedMlp) -> tuple[Tensor, Tensor]:
    folded = side_by_side(shared, private)
    return folded.gate_FH, folded.up_FH


@pytest.mark.parametrize("wrong", [down_swapped, gate_and_up_swapped, weights_added])
def test_a_wrong_fold_is_far_from_the_sum(wrong: Fold) -> None:
    """Else the property above would not show a mistake."""
    assert error(wrong, random_mlp(5, 1), random_mlp(5, 2)) > 0.1
