# M rows, X inputs, Y outputs, R rank columns (of one LoRA, or of several side by side)
"""LoRAs of several targets in one forward of their base: every row gets the delta of its own target.

y = W x + B A x (LoRA, arXiv 2106.09685, eq. 3, the factor alpha / r in B). The A of all LoRAs present stand side by
side, so that one product serves all rows; what a row got from another target's A is zeroed before B. Cost grows with
the ranks present, not with the targets registered, and no row is looked at by Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

# The products of a decoder layer; q/k/v are fused in one, gate and up in another.
Part = Literal["qkv", "out", "gate_up", "down"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, eq=False)
class Delta:
    """What LoRAs add to one product: x `down_XR`, masked by `ranks`, times `up_RY`. `ranks`: columns by LoRA."""

    down_XR: Tensor
    up_RY: Tensor
    ranks: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Lora:
    """The deltas of one target, or of several side by side, by layer and product; a product may have none."""

    layers: tuple[dict[Part, Delta], ...]

    @property
    def num_bytes(self) -> int:
        deltas = [delta for layer in self.layers for delta in layer.values()]
        return sum(delta.down_XR.nbytes + delta.up_RY.nbytes for delta in deltas)


@dataclass(frozen=True)
class LoraRows:
    """The LoRA that each row of a forward call has; `which_M[m]` is an index into the stack, -1 for none."""

    stack: Lora
    which_M: Tensor
    _masks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def add(self, layer: int, part: Part, x_MX: Tensor, y_MY: Tensor) -> Tensor:
        """y with each row's delta of x added in place."""
        delta = self.stack.layers[layer].get(part)
        if delta is None:
            return y_MY
        z_MR = torch.mm(x_MX, delta.down_XR).mul_(self._mask(delta))
        return y_MY.addmm_(z_MR, delta.up_RY)

    def _mask(self, delta: Delta) -> Tensor:
        """1 where a column [M, R] belongs to the row's LoRA; the same for all products of the same ranks."""
        if delta.ranks not in self._masks:
            owners = [index for index, rank in enumerate(delta.ranks) for _ in range(rank)]
            owner_R = torch.tensor(owners, device=self.which_M.device)
            self._masks[delta.ranks] = (self.which_M[:, None] == owner_R).to(delta.up_RY.dtype)
        return self._masks[delta.ranks]


def stack_loras(loras: Sequence[Lora]) -> Lora:
    """The deltas of all side by side, in this order."""
    return Lora(tuple(_stack_layer(layer) for layer in zip(*(lora.layers for lora in loras), strict=True)))


def _stack_layer(layers: Sequence[dict[Part, Delta]]) -> dict[Part, Delta]:
    stacked: dict[Part, Delta] = {}
    for part in PARTS:
        deltas = [layer.get(part) for layer in layers]
        present = [delta for delta in deltas if delta is not None]
        if present:
            down_XR = torch.cat([delta.down_XR for delta in present], dim=1)
            up_RY = torch.cat([delta.up_RY for delta in present])
            ranks = tuple(0 if delta is None else sum(delta.ranks) for delta in deltas)
            stacked[part] = Delta(down_XR, up_RY, ranks)
    return stacked
