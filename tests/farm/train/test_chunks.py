"""Losses in chunks are those of all positions at once, and no more logits exist than were asked for."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from farm.draft.model import DraftHead
from farm.train.chunks import Wanted, position_losses
from farm.train.loss import LOSSES, acceptance, forward_kl

M, H, C = 23, 6, 11


@dataclass(frozen=True)
class Counted(DraftHead):
    """A head that remembers how many rows it was asked for at once."""

    rows: list[int] = field(default_factory=list)

    def logits(self, hidden: Tensor) -> Tensor:
        self.rows.append(len(hidden))
        return super().logits(hidden)


@pytest.fixture
def case() -> tuple[Counted, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, predicted, hidden = (
        torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (C, M, M)
    )
    return Counted(weight, weight, None), predicted.requires_grad_(), hidden


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rows", [1, 5, 23, 100])
def test_chunks_change_neither_values_nor_gradients(
    case: tuple[Counted, Tensor, Tensor], name: str, rows: int
) -> None:
    head, predicted, hidden = case
    weights = torch.rand(M, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = position_losses(head, predicted, hidden, Wanted(name, True, True, rows))
    draft, target = predicted @ head.weight_CH.t(), hidden @ head.weight_CH.t()
    expected = LOSSES[name](draft, target)
    torch.testing.assert_close(found.loss_M, expected)
    torch.testing.assert_close(found.divergence_M, forward_kl(draft, target).detach())
    torch.testing.assert_close(found.alpha_M, acceptance(draft, target).detach())
    ours = torch.autograd.grad((found.loss_M * weights).sum(), predicted)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), predicted)[0]
    torch.testing.assert_close(ours, theirs)
    assert max(head.rows) <= rows


@pytest.mark.parametrize(("numbers", "rows"), [(2**26, 128), (50 * 2048, 50), (1, 1)])
def test_a_wide_head_is_read_for_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, numbers: int, rows: int
) -> None:
    """As nobody says how many: all logits of a batch at once would be gigabytes."""
    monkeypatch.setattr("farm.train.chunks.LOGIT_NUMBERS", numbers)
    weight, hidden = torch.zeros(2048, H), torch.zeros(150, H)
    head = Counted(weight, weight, None)
    position_losses(head, hidden, hidden, Wanted("kl"))
    assert max(head.rows) == rows


def test_a_position_that_is_left_out_spoils_nothing_by_an_infinite_gradient(
    case: tuple[Counted, Tensor, Tensor],
) -> None:
    head, predicted, hidden = case
    broken = predicted.detach().clone()
    broken[3] = torch.inf
    broken.requires_grad_()
    loss = position_losses(head, broken, hidden, Wanted("kl")).loss_M
    keep = torch.arange(M) != 3
    torch.where(keep, loss, 0.0).sum().backward()
    assert torch.isfinite(broken.grad).all()
    assert not broken.grad[3].any()


def test_without_a_gradient_none_is_computed(case: tuple[Counted, Tensor, Tensor]) -> None:
    head, predicted, hidden = case
    found = position_losses(head, predicted.detach(), hidden, Wanted("tv"))
    assert not found.loss_M.requires_grad
    assert found.divergence_M is None
