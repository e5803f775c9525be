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

    A position takes 2 H numbers of `dtype`, and h_{t+1} as the samples have it.
    """
    device, parts, feature_dtype = trunk.fc.weight.device, [], samples[0][1].features_TH.dtype
    in_order = sorted(samples, key=lambda item: len(item[1].tokens_T))  # rows of one length waste no padding
    for start in range(0, len(in_order), batch_rows):
        numbers, rows = zip(*in_order[start : start + batch_rows], strict=True)
        batch = collate(rows, prompt_tokens=prompt_tokens, numbers=numbers).to(device)
        mask_BT = batch.mask(0)
        residual_BTH, normed_BTH = frozen_part(trunk, head.embed(batch.next_tokens_BT), batch.hidden_BTH)
        hidden_MH = shift(batch.hidden_BTH, 1)[mask_BT].to(feature_dtype)
        residual_MH, normed_MH = (part_BTH[mask_BT].to(dtype) for part_BTH in (residual_BTH, normed_BTH))
        parts.append(Positions(residual_MH, normed_MH, hidden_MH, batch.where(0)))
    return Positions(
        torch.cat([part.residual_MH for part in parts]),
        torch.cat([part.normed_MH for part in parts]),
        torch.cat([part.hidden_MH for part in parts]),
        Where(
            torch.cat([part.at.sample_M for part in parts]), torch.cat([part.at.index_M for part in parts])
        ),
    )
