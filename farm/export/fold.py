# H hidden, F width of a gated MLP, Y outputs, X inputs, R rank
"""A trunk's shared expert and a private expert as the one MLP of a plain EAGLE-1 layer.

Two gated MLPs over the same input add up to one: each of its F products is computed from its own row of gate and up and
enters the sum through its own column of down. So

    D_s (silu(G_s n) * U_s n) + D_p (silu(G_p n) * U_p n) = [D_s D_p] (silu([G_s; G_p] n) * [U_s; U_p] n)

for any two widths. Nothing is computed but the order of a sum changes, so a folded draft in fp32 proposes what the
unfolded one does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from farm.draft.expert import Expert


@dataclass(frozen=True)
class GatedMlp:
    """D (silu(G n) * U n)."""

    gate_FH: Tensor
    up_FH: Tensor
    down_HF: Tensor

    @classmethod
    def of(cls, expert: Expert) -> GatedMlp:
        return cls(*(p.weight.detach() for p in (expert.gate_proj, expert.up_proj, expert.down_proj)))

    @property
    def width(self) -> int:
        return self.gate_FH.shape[0]


def side_by_side(first: GatedMlp, second: GatedMlp) -> GatedMlp:
    """The one MLP whose output is the sum of both, for the same input; widths add up."""
    return GatedMlp(
        torch.cat((first.gate_FH, second.gate_FH)),
        torch.cat((first.up_FH, second.up_FH)),
        torch.cat((first.down_HF, second.down_HF), dim=1),
    )


def padded(mlp: GatedMlp, multiple: int) -> GatedMlp:
    """The MLP with its width raised to a multiple, as tensor parallelism and quantization groups ask for.

    What is added is 0 everywhere, so the output stays the same to the bit wherever products are summed in order.
    """
    rows = -mlp.width % multiple
    return GatedMlp(
        functional.pad(mlp.gate_FH, (0, 0, 0, rows)),
        functional.pad(mlp.up_FH, (0, 0, 0, rows)),
        functional.pad(mlp.down_HF, (0, rows)),
    )
