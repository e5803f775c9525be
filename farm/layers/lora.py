# B rows, T tokens, M = B T, E LoRAs, N gathered tokens, X inputs, Y outputs, R rank columns
"""LoRAs of several targets in one forward of their base: every row gets the delta of its own target.

y = W x + B A x (LoRA, arXiv 2106.09685, eq. 3, the factor alpha / r in B). Rows are multiplied with the stacked A and B
of the LoRAs present, one grouped product each, so that cost grows with the targets present, not with those registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

# The products of a decoder layer; q/k/v are fused in one, gate and up in another.
Part = Literal["qkv", "out", "gate_up", "down"]
PARTS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, eq=False)
class Delta:
    """What E LoRAs add to one product: x `down` `up`; smaller ranks are padded with zeros, which changes nothing."""

    down_EXR: Tensor
    up_ERY: Tensor

    def widened(self, rank: int) -> Delta:
        """The same with `rank` columns."""
        missing = rank - self.down_EXR.shape[2]
        padded = functional.pad(self.down_EXR, (0, missing)), functional.pad(self.up_ERY, (0, 0, 0, missing))
        return Delta(*padded) if missing else self


@dataclass(frozen=True, eq=False)
class Lora:
    """The deltas of E targets by layer and product; a product that no target changes has none."""

    layers: tuple[dict[Part, Delta], ...]
    num_targets: int = 1

    @property
    def num_bytes(self) -> int:
        deltas = [delta for layer in self.layers for delta in layer.values()]
        return sum(delta.down_EXR.nbytes + delta.up_ERY.nbytes for delta in deltas)


class LoraRows:
    """The LoRA that each row of a forward call has."""

    def __init__(self, stack: Lora, which: Sequence[int], num_tokens: int, device: torch.device) -> None:
        """`which[b]` is the index of row b's LoRA in the stack, -1 for none; each row has `num_tokens` tokens."""
        self.stack = stack
        members = [
            [row for row, one in enumerate(which) if one == index] for index in range(stack.num_targets)
        ]
        most = max(map(len, members))
        # Rows that stand by target in equal numbers are a view; others are gathered, padded to the largest number.
        self._in_line = [row for rows in members for row in rows] == list(range(most * len(members)))
        self._in_line &= len(which) == most * len(members)
        if self._in_line:
            return
        token_T = torch.arange(num_tokens, device=device)

        def tokens_of(rows: list[int]) -> Tensor:
            return (torch.tensor(rows, device=device)[:, None] * num_tokens + token_T).view(-1)

        self._gather_N = tokens_of([row for rows in members for row in (*rows, *[0] * (most - len(rows)))])
        self._changed_M = tokens_of([row for rows in members for row in rows])
        places = [e * most + i for e, rows in enumerate(members) for i in range(len(rows))]
        self._place_M = tokens_of(places)

    def add(self, layer: int, part: Part, x_MX: Tensor, y_MY: Tensor) -> Tensor:
        """y with each row's delta of x added in place."""
        delta, num = self.stack.layers[layer].get(part), self.stack.num_targets
        if delta is None:
            return y_MY
        if self._in_line and num == 1:
            return y_MY.addmm_(torch.mm(x_MX, delta.down_EXR[0]), delta.up_ERY[0])
        if self._in_line:
            z_ENR = torch.bmm(x_MX.view(num, -1, x_MX.shape[1]), delta.down_EXR)
            y_MY.view(num, -1, y_MY.shape[1]).baddbmm_(z_ENR, delta.up_ERY)
            return y_MY
        z_ENR = torch.bmm(x_MX[self._gather_N].view(num, -1, x_MX.shape[1]), delta.down_EXR)
        added_NY = torch.bmm(z_ENR, delta.up_ERY).flatten(0, 1)
        return y_MY.index_add_(0, self._changed_M, added_NY[self._place_M])


def stack_loras(loras: Sequence[Lora]) -> Lora:
    """The deltas of several targets, in this order."""
    layers = tuple(_stack_layer(layer) for layer in zip(*(lora.layers for lora in loras), strict=True))
    return Lora(layers, sum(lora.num_targets for lora in loras))


def _stack_layer(layers: Sequence[dict[Part, Delta]]) -> dict[Part, Delta]:
    stacked: dict[Part, Delta] = {}
    for part in PARTS:
        present = [layer[part] for layer in layers if part in layer]
        if not present:
            continue
        rank, like = max(delta.down_EXR.shape[2] for delta in present), present[0]
        nothing = Delta(
            like.down_EXR.new_zeros(like.down_EXR.shape), like.up_ERY.new_zeros(like.up_ERY.shape)
        )
        deltas = [layer.get(part, nothing).widened(rank) for layer in layers]
        down_EXR = torch.cat([delta.down_EXR for delta in deltas])
        stacked[part] = Delta(down_EXR, torch.cat([delta.up_ERY for delta in deltas]))
    return stacked
