# B rows, T tokens, M = B T, E experts present, R rows of an expert (the most), H hidden, F expert width
# P numbers of an expert
"""Private experts and changes to the trunk, routed by row: grouped products over those present, whatever their number.

A batch of mixed targets shares one pass through the trunk; only the private expert differs by row. Rows are gathered
by expert, padded to the largest group, and multiplied with the stacked weights at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.draft.expert import Expert
from farm.layers.dense import swiglu
from farm.layers.lora import Lora, LoraRows

KEPT_LENGTHS = 8  # of calls whose rows stay divided by target


@dataclass(frozen=True)
class FlatExpert:
    """One private expert in one stretch of memory, so that putting experts together is one copy."""

    flat_P: Tensor  # gate and up [H, 2 F], then down [F, H]
    hidden_size: int

    @classmethod
    def of(cls, expert: Expert, width: int) -> FlatExpert:
        """Padded with zeros to `width`, which changes nothing."""
        missing = width - expert.gate_proj.weight.shape[0]
        gate_FH, up_FH = _widen(expert.gate_proj.weight, missing), _widen(expert.up_proj.weight, missing)
        down_FH = _widen(expert.down_proj.weight.t(), missing)
        gate_up_HF = torch.cat((gate_FH, up_FH)).t()
        return cls(torch.cat((gate_up_HF.flatten(), down_FH.flatten())), down_FH.shape[1])


class ExpertStack:
    """Weights of several private experts of one width."""

    def __init__(self, experts: Sequence[FlatExpert]) -> None:
        flat_EP, hidden = torch.stack([expert.flat_P for expert in experts]), experts[0].hidden_size
        width = flat_EP.shape[1] // (3 * hidden)
        gate_up_EP, down_EP = flat_EP.tensor_split([2 * hidden * width], dim=1)
        self.gate_up_EHF = gate_up_EP.view(-1, hidden, 2 * width)
        self.down_EFH = down_EP.view(-1, width, hidden)


@dataclass(frozen=True)
class RoutedExperts:
    """The private expert of every row of a batch; called like one expert."""

    stack: ExpertStack
    num_rows: int
    # E * R row numbers: the rows of each expert in turn, padded with any row; None: as they are.
    gather_N: Tensor | None
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
        device, in_line = stack.down_EFH.device, gather == list(range(len(which)))
        gather_N = None if in_line else torch.tensor(gather, device=device)
        return cls(stack, len(which), gather_N, torch.tensor(scatter, device=device))

    def add_to(self, residual_MH: Tensor, normed_MH: Tensor) -> Tensor:
        """residual + each row's expert of normed."""
        num_experts, width, hidden = self.stack.down_EFH.shape
        rows_BX = normed_MH.view(self.num_rows, -1)
        rows_NX = rows_BX if self.gather_N is None else rows_BX[self.gather_N]
        gate_up_ERF = torch.bmm(rows_NX.view(num_experts, -1, hidden), self.stack.gate_up_EHF)
        gated_ERF = swiglu(gate_up_ERF)
        if self.gather_N is None:
            residual_ERH = residual_MH.view(num_experts, -1, hidden)
            return torch.baddbmm(residual_ERH, gated_ERF, self.stack.down_EFH).view_as(residual_MH)
        out_NX = torch.bmm(gated_ERF, self.stack.down_EFH).view(-1, rows_BX.shape[1])
        return residual_MH + out_NX[self.scatter_B].view_as(residual_MH)


class RoutedDeltas:
    """What each row of a batch changes in the trunk; rows have `num_tokens` tokens each, as many as a call says."""

    def __init__(self, stack: Lora, which: Sequence[int], device: torch.device) -> None:
        """`which[b]` is the index of row b's changes in the stack, -1 for none."""
        self.rows = functools.lru_cache(KEPT_LENGTHS)(
            lambda num_tokens: LoraRows((), which, num_tokens, device, lambda: stack)
        )


def _widen(weight_FH: Tensor, missing: int) -> Tensor:
    weight_FH = weight_FH.detach()
    return (
        weight_FH if not missing else torch.cat((weight_FH, weight_FH.new_zeros(missing, weight_FH.shape[1])))
    )
