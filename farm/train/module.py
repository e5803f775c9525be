# B rows, T draft positions, M masked positions, H hidden, S unrolled steps
"""What DeepSpeed trains: a module that owns the trainable part only; it gives losses a position.

The scalar is made outside (`mean_loss`), since what a position weighs depends on those of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farm.draft.model import DraftHead
from farm.train.batches import Batch, Where
from farm.train.cached import Positions
from farm.train.chunks import PositionLosses, Wanted, position_losses
from farm.train.loss import STEP_DECAY, smooth_l1
from farm.train.tiers import TrainedDraft
from farm.train.unroll import unroll


@dataclass(frozen=True)
class StepLosses:
    """One unrolled step of one batch on one rank, positions in the order of `at`."""

    distribution: PositionLosses
    hidden_M: Tensor  # smooth L1
    at: Where


@dataclass(frozen=True)
class Learned:
    """Positions of one step that the loss is a mean over, on all ranks together: of hidden states, of distributions."""

    count: Tensor  # scalar int64
    num_kept: Tensor  # scalar int64
    kept_M: Tensor | None = None  # this rank's, bool; None: all


class DraftLoss(nn.Module):
    """The loss of a draft at every position; its parameters are exactly what is trained.

    Frozen parts are held in tuples, outside the module tree: DeepSpeed broadcasts and casts everything it can see,
    and the trunk's tensors are pages that other processes map too.
    """

    def __init__(self, trained: TrainedDraft, head: DraftHead, num_steps: int, loss: str) -> None:
        super().__init__()
        self.trained = trained
        self._head = (head,)
        self.num_steps, self.loss = num_steps, loss

    def forward(
        self, batch: Batch | Positions, *, divergence: bool = False, alpha: bool = False
    ) -> tuple[StepLosses, ...]:
        """Losses of every unrolled step; of cached positions there is one. Forward KL and alpha only if asked for."""
        wanted = Wanted(self.loss, divergence, alpha)
        if isinstance(batch, Positions):
            predicted_MH = batch.residual_MH + self.trained.expert(batch.normed_MH)
            return (self._losses(predicted_MH, batch.hidden_MH, batch.at, wanted),)
        embedded_BTH = self._head[0].embed(batch.next_tokens_BT)
        at = [batch.masked(step) for step in range(self.num_steps)]
        predicted = unroll(self.trained.as_draft(), embedded_BTH, batch.hidden_BTH, self.num_steps, at)
        steps = []
        for step, (predicted_MH, at_M) in enumerate(zip(predicted, at, strict=True)):
            hidden_MH = batch.hidden_BTH.flatten(0, 1)[at_M + step + 1]
            steps.append(self._losses(predicted_MH, hidden_MH, batch.where(step), wanted))
        return tuple(steps)

    def _losses(self, predicted_MH: Tensor, hidden_MH: Tensor, at: Where, wanted: Wanted) -> StepLosses:
        distribution = position_losses(self._head[0], predicted_MH, hidden_MH, wanted)
        return StepLosses(distribution, smooth_l1(predicted_MH, hidden_MH), at)


def mean_loss(
    steps: tuple[StepLosses, ...], learned: tuple[Learned, ...], hidden_weight: float, world: int
) -> Tensor:
    """The scalar whose gradients, averaged over `world` ranks, are those of the global mean loss.

    Each step is a mean over the kept positions for the distributions, plus one over all for the hidden states.
    """
    total = steps[0].hidden_M.new_zeros(())
    for number, (step, of) in enumerate(zip(steps, learned, strict=True)):
        loss_M = step.distribution.loss_M
        if of.kept_M is not None:  # not a product: what is left out may be infinite
            loss_M = torch.where(of.kept_M, loss_M, 0.0)
        distribution = loss_M.sum() / of.num_kept.clamp(min=1)
        hidden = step.hidden_M.sum() / of.count.clamp(min=1)
        total = total + STEP_DECAY**number * world * (distribution + hidden_weight * hidden)
    return total
