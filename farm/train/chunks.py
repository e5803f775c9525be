# M masked positions, H hidden, C draft vocabulary
"""Losses of many positions while the logits of a bounded number of them exist.

A head is frozen, so a chunk's gradient with respect to its predicted hidden states is taken at once, in closed form,
and its logits are dropped; what backward still does is to scale each position's gradient. Nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from farm.draft.model import DraftHead
from farm.train.loss import graded

LOGIT_NUMBERS: Final = 2**26  # of one chunk of one model's logits: 256 MiB in float32
# On a CPU: 512 KiB, so that the passes over a chunk stay in its caches; but the head is read once for as many rows.
CPU_LOGIT_NUMBERS: Final = 2**17
CPU_ROWS: Final = 128


@dataclass(frozen=True)
class PositionLosses:
    """A number a position, [M] each; `divergence` and `alpha` carry no gradient and are None unless asked for."""

    loss_M: Tensor
    divergence_M: Tensor | None  # forward KL
    alpha_M: Tensor | None


@dataclass(frozen=True)
class Wanted:
    """Which loss, what is measured beside it, and how many rows of logits may exist at once (None: by their width)."""

    loss: str  # a name of farm.train.loss.LOSSES
    divergence: bool = False
    alpha: bool = False
    rows: int | None = None


def position_losses(
    head: DraftHead, predicted_MH: Tensor, hidden_MH: Tensor, wanted: Wanted
) -> PositionLosses:
    """The loss at every position, from the draft's predicted hidden states and the target's true ones.

    Gradients flow into `predicted_MH` alone.
    """
    loss_M, divergence_M, alpha_M = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        predicted_MH, hidden_MH, head, wanted
    )
    return PositionLosses(
        loss_M, divergence_M if wanted.divergence else None, alpha_M if wanted.alpha else None
    )


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, predicted_MH: Tensor, hidden_MH: Tensor, head: DraftHead, wanted: Wanted
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = wanted.rows or _chunk_rows(head.weight_CH)
        learns = bool(ctx.needs_input_grad[0])
        losses, divergences, alphas, gradients = [], [], [], []
        for x_MH, h_MH in zip(_split(predicted_MH, rows), _split(hidden_MH, rows), strict=True):
            found = graded(wanted.loss, head.logits(x_MH), head.logits(h_MH))
            losses.append(found.loss_M)
            divergences.append(found.divergence_M)
            alphas.append(found.alpha_M)
            if learns:
                gradients.append(functional.linear(found.gradient_MC.to(x_MH.dtype), head.weight_CH.t()))
        out = tuple(torch.cat(part) for part in (losses, divergences, alphas))
        if learns:
            ctx.save_for_backward(torch.cat(gradients))
        ctx.mark_non_differentiable(*out[1:])
        return out[0], out[1], out[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_MH,) = ctx.saved_tensors
        scale_M1 = grads[0][:, None].to(gradient_MH.dtype)
        # Not a product alone: a position that is left out may have no finite gradient.
        return torch.where(scale_M1 == 0, 0.0, gradient_MH * scale_M1), None, None, None


def _chunk_rows(weight_CH: Tensor) -> int:
    most = max(1, LOGIT_NUMBERS // weight_CH.shape[0])
    if weight_CH.device.type != "cpu":
        return most
    return min(most, max(CPU_ROWS, CPU_LOGIT_NUMBERS // weight_CH.shape[0]))


def _split(values_MH: Tensor, rows: int) -> tuple[Tensor, ...]:
    return torch.split(values_MH, rows)
