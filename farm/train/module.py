# B rows, T draft positions, M masked positions, H hidden, C draft vocabulary
"""What DeepSpeed trains: a module that owns the trainable part only, and computes the unrolled loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from farm.draft.expert import Expert
from farm.draft.model import Draft, DraftHead
from farm.draft.trunk import Trunk
from farm.train.batches import Batch
from farm.train.loss import HIDDEN_WEIGHT, STEP_DECAY, acceptance, smooth_l1, soft_cross_entropy
from farm.train.unroll import shift, unroll


@dataclass(frozen=True)
class Sums:
    """Of one batch on one rank: the loss's sums, positions and expected acceptances of each unrolled step."""

    losses: tuple[Tensor, ...]
    counts_S: Tensor  # int64
    accepted_S: Tensor  # zeros unless measured


class DraftLoss(nn.Module):
    """The unrolled loss of a draft; its parameters are exactly what is trained.

    Frozen parts are held in a tuple, outside the module tree: DeepSpeed broadcasts and casts everything it can see,
    and the trunk's tensors are pages that other processes map too.
    """

    def __init__(
        self, trunk: Trunk, expert: Expert, head: DraftHead, num_steps: int, *, train_trunk: bool
    ) -> None:
        super().__init__()
        self.expert = expert
        self._frozen: tuple[Trunk, ...] = ()
        if train_trunk:
            self.trunk: Trunk | None = trunk
        else:
            self.trunk, self._frozen = None, (trunk,)
        self._head = (head,)
        self.num_steps = num_steps

    def freeze(self, trunk: Trunk) -> None:
        """Uses another copy of the frozen trunk, of another device or dtype."""
        self._frozen = (trunk,)

    def forward(self, batch: Batch, *, measure: bool) -> Sums:
        """Sums over the batch's masked positions, one for each unrolled step; acceptances only if asked for."""
        head = self._head[0]
        trunk = self.trunk if self.trunk is not None else self._frozen[0]
        predicted = unroll(
            Draft(trunk, self.expert), head.embed(batch.next_tokens_BT), batch.hidden_BTH, self.num_steps
        )
        losses, counts, accepted = [], [], []
        for step, predicted_BTH in enumerate(predicted):
            mask_BT = batch.mask(step)
            predicted_MH = predicted_BTH[mask_BT]
            hidden_MH = shift(batch.hidden_BTH, step + 1)[mask_BT]
            with torch.no_grad():
                target_MC = head.logits(hidden_MH)
            draft_MC = head.logits(predicted_MH)
            losses.append(
                soft_cross_entropy(draft_MC, target_MC) + HIDDEN_WEIGHT * smooth_l1(predicted_MH, hidden_MH)
            )
            counts.append(mask_BT.sum())
            accepted.append(acceptance(draft_MC, target_MC) if measure else draft_MC.new_zeros(()))
        return Sums(tuple(losses), torch.stack(counts), torch.stack(accepted))


def weighted(sums: Sums, global_counts_S: Tensor, world: int) -> Tensor:
    """The scalar whose gradients, averaged over `world` ranks, are those of the global mean loss."""
    total = sums.losses[0].new_zeros(())
    for step, loss in enumerate(sums.losses):
        total = total + STEP_DECAY**step * loss * world / global_counts_S[step].clamp(min=1)
    return total
