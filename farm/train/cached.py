# N cached positions, M positions of a batch, H hidden
"""The cached form: what the frozen trunk puts out is computed once, and an expert is fitted to shuffled positions.

    h^_{t+1} = a_t + E_shared(n_t) + E_private(n_t)      a, n and E_shared are frozen: only the last term changes

A step is then one gated MLP and the head: no attention, no backward through the trunk, no padding. It is exact for the
first unrolled step alone; later ones read predictions, which change while training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.data.features import Sample
from farm.draft.model import DraftHead
from farm.draft.trunk import Trunk
from farm.train.batches import Where, collate
from farm.train.unroll import frozen_part, shift


@dataclass(frozen=True)
class Positions:
    """Positions with everything that an expert is fitted with; hidden states are [M, H]."""

    residual_MH: Tensor  # the trunk's output, shared expert included
    normed_MH: Tensor  # the expert's input
    hidden_MH: Tensor  # h_{t+1}
    at: Where

    def take(self, rows: Tensor) -> Positions:
        """Some of them, by number, in float32."""
        at = Where(self.at.sample_M[rows], self.at.index_M[rows])
        parts = (self.residual_MH, self.normed_MH, self.hidden_MH)
        return Positions(*(part_MH[rows].float() for part_MH in parts), at)

    def to(self, _device: torch.device) -> Positions:
        """Themselves: they are made where they are used."""
        return self

    def __len__(self) -> int:
        return len(self.residual_MH)


def bytes_of(samples: Sequence[Sample], dtype: torch.dtype) -> int:
    """What caching these samples takes at most."""
    positions = sum(len(sample.tokens_T) for sample in samples)
    return (
        positions
        * samples[0].features_TH.shape[1]
        * (2 * dtype.itemsize + samples[0].features_TH.element_size())
    )


@torch.no_grad()
def cache_positions(
    trunk: Trunk,
    head: DraftHead,
    samples: Sequence[tuple[int, Sample]],
    *,
    batch_rows: int,
    prompt_tokens: bool,
    dtype: torch.dtype = torch.float32,
) -> Positions:
    """Every trained position of numbered samples, on the trunk's device.

    A position takes 2 H numbers of `dtype`, and h_{t+1} as the samples have it. No more than `bytes_of` is held, beside
    what one batch takes.
    """
    device, at = trunk.fc.weight.device, []
    parts, filled = _empty([sample for _, sample in samples], prompt_tokens, dtype, device), 0
    in_order = sorted(samples, key=lambda item: len(item[1].tokens_T))  # rows of one length waste no padding
    for start in range(0, len(in_order), batch_rows):
        numbers, rows = zip(*in_order[start : start + batch_rows], strict=True)
        batch = collate(rows, prompt_tokens=prompt_tokens, numbers=numbers).to(device)
        mask_BT = batch.mask(0)
        residual_BTH, normed_BTH = frozen_part(trunk, head.embed(batch.next_tokens_BT), batch.hidden_BTH)
        at.append(batch.where(0))
        end = filled + len(at[-1].index_M)
        for part_MH, new_BTH in zip(
            parts, (residual_BTH, normed_BTH, shift(batch.hidden_BTH, 1)), strict=True
        ):
            part_MH[filled:end] = new_BTH[mask_BT].to(part_MH.dtype)
        filled = end
    where = Where(torch.cat([one.sample_M for one in at]), torch.cat([one.index_M for one in at]))
    return Positions(*(part_MH[:filled] for part_MH in parts), where)


def _empty(
    samples: Sequence[Sample], prompt_tokens: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the hidden states of Positions, in their order: for every token that is learned from, [M, H]."""
    most = sum(len(sample.tokens_T) if prompt_tokens else sample.num_said for sample in samples)
    features_TH = samples[0].features_TH
    shape = (most, features_TH.shape[1])
    residual_MH, normed_MH = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    return residual_MH, normed_MH, torch.empty(shape, dtype=features_TH.dtype, device=device)
