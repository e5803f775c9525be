# B rows, T tokens, M = B T, E experts present, R rows of an expert (the most), H hidden, F expert width
"""Private experts routed by row: one grouped product over the experts present, whatever their number.

A batch of mixed targets shares one pass through the trunk; only the private expert differs by row. Rows are gathered
by expert, padded to the largest group, and multiplied with the stacked weights at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.draft.expert import Expert
from farm.layers.dense import swiglu


@dataclass(frozen=True)
class ExpertStack:
    """Weights of several private experts; narrower ones are padded with zeros, which changes nothing."""

    gate_up_EHF: Tensor  # [E, H, 2 F]
    down_EFH: Tensor

    @classmethod
    def of(cls, experts: Sequence[Expert]) -> ExpertStack:
        width = max(expert.gate_proj.weight.shape[0] for expert in experts)
        gates, ups, downs = [], [], []
        for expert in experts:
            missing = width - expert.gate_proj.weight.shape[0]
            gates.append(_widen(expert.gate_proj.weight, missing))
            ups.append(_widen(expert.up_proj.weight, missing))
            downs.append(_widen(expert.down_proj.weight.t(), missing))
        gate_up_EFH = torch.cat((torch.stack(gates), torch.stack(ups)), dim=1)
        return cls(gate_up_EFH.transpose(1, 2).contiguous(), torch.stack(downs).contiguous())


@dataclass(frozen=True)
class RoutedExperts:
    """The private expert of every row of a batch; called like one expert."""

    stack: ExpertStack
    gather_N: Tensor  # E * R row numbers: the rows of each expert in turn, padded with any row
    scatter_B: Tensor  # where row b is among those

    @classmethod
    def of(cls, stack: ExpertStack, which: Sequence[int]) -> RoutedExperts:
        """`which[b]` is the index of row b's expert in the stack."""
        members: list[list[int]] = [[] for _ in range(stack.down_EFH.shape[0])]
        for row, expert in enumerate(which):
            members[expert].append(row)
        most = max(map(len, members))
        gather, scatter = [0] * (most * len(members)), [0] * len(which)
        for expert, rows in enumerate(members):
            for index, row in enumerate(rows):
                gather[expert * most + index], scatter[row] = row, expert * most + index
        device = stack.down_EFH.device
        return cls(stack, torch.tensor(gather, device=device), torch.tensor(scatter, device=device))

    def add_to(self, residual_MH: Tensor, normed_MH: Tensor) -> Tensor:
        """residual + each row's expert of normed."""
        num_experts, width, hidden = self.stack.down_EFH.shape
        rows_BX = normed_MH.view(self.scatter_B.shape[0], -1)
        x_ERH = rows_BX[self.gather_N].view(num_experts, -1, hidden)
        gated_ERF = swiglu(torch.bmm(x_ERH, self.stack.gate_up_EHF))
        out_NX = torch.bmm(gated_ERF, self.stack.down_EFH).view(-1, rows_BX.shape[1])
        return residual_MH + out_NX[self.scatter_B].view_as(residual_MH)


def _widen(weight_FH: Tensor, missing: int) -> Tensor:
    weight_FH = weight_FH.detach()
    return (
        weight_FH if not missing else torch.cat((weight_FH, weight_FH.new_zeros(missing, weight_FH.shape[1])))
    )
