# B rows, T tokens, M = B T, E LoRAs, N gathered tokens, X inputs, Y outputs, R rank columns, P numbers of a LoRA
"""LoRAs of several targets in one forward of their base: every row gets the delta of its own target.

y = W x + B A x (LoRA, arXiv 2106.09685, eq. 3, the factor alpha / r in B). Rows are multiplied with the stacked A and B
of the LoRAs present, one grouped product each, so that cost grows with the targets present, not with those registered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# The products of a decoder layer, and the one in front of a draft's; q/k/v are fused in one, gate and up in another.
Part = Literal["fc", "qkv", "out", "gate_up", "down"]


class Delta(NamedTuple):
    """What E LoRAs add to one product: x `down` `up`; smaller ranks are padded with zeros, which changes nothing."""

    down_EXR: Tensor
    up_ERY: Tensor


class Place(NamedTuple):
    """Where a LoRA changes something, and the sizes of its factors there."""

    layer: int
    part: Part
    num_inputs: int
    num_outputs: int
    rank: int

    @property
    def size(self) -> int:
        return self.rank * (self.num_inputs + self.num_outputs)


class Lora:
    """The deltas of E targets, each target's in one stretch of memory, so that putting targets together is one copy."""

    def __init__(self, places: tuple[Place, ...], flat_EP: Tensor) -> None:
        """`flat_EP` holds for each place in turn the down factor and then the up factor."""
        self.places, self.flat_EP, self.num_targets = places, flat_EP, flat_EP.shape[0]
        self._deltas: dict[tuple[int, Part], Delta] = {}
        stretches = flat_EP.split([place.size for place in places], dim=1)
        for place, stretch_EP in zip(places, stretches, strict=True):
            down_EP, up_EP = stretch_EP.tensor_split([place.num_inputs * place.rank], dim=1)
            down_EXR = down_EP.unflatten(1, (place.num_inputs, place.rank))
            self._deltas[place.layer, place.part] = Delta(
                down_EXR, up_EP.unflatten(1, (place.rank, place.num_outputs))
            )

    @classmethod
    def of(cls, factors: Mapping[tuple[int, Part], tuple[Tensor, Tensor]]) -> Lora:
        """One target's, from its down [X, R] and up [R, Y] factors by layer and product."""
        places = tuple(
            Place(layer, part, down_XR.shape[0], up_RY.shape[1], down_XR.shape[1])
            for (layer, part), (down_XR, up_RY) in factors.items()
        )
        return cls(
            places, torch.cat([factor.flatten() for pair in factors.values() for factor in pair])[None]
        )

    @property
    def num_bytes(self) -> int:
        return self.flat_EP.nbytes

    def delta(self, layer: int, part: Part) -> Delta | None:
        """None for a product that no target changes."""
        return self._deltas.get((layer, part))

    def at(self, places: Sequence[Place]) -> Lora:
        """The same at places that include its own, with ranks at least its own."""
        if tuple(places) == self.places:
            return self
        parts = []
        for place in places:
            delta = self.delta(place.layer, place.part)
            if delta is None:
                parts.append(self.flat_EP.new_zeros(self.num_targets, place.size))
                continue
            missing = place.rank - delta.down_EXR.shape[2]
            padded = (
                functional.pad(delta.down_EXR, (0, missing)),
                functional.pad(delta.up_ERY, (0, 0, 0, missing)),
            )
            parts += [factor.flatten(1) for factor in padded]
        return Lora(tuple(places), torch.cat(parts, dim=1))


def stack_loras(loras: Sequence[Lora]) -> Lora:
    """The deltas of several targets, in this order."""
    if len(loras) == 1:
        return loras[0]
    widest: dict[tuple[int, Part], Place] = {}
    # Of the same layer and part the largest rank comes last and stays.
    for place in sorted(place for lora in loras for place in lora.places):
        widest[place.layer, place.part] = place
    same = all(lora.places == loras[0].places for lora in loras)
    places = loras[0].places if same else tuple(widest.values())
    return Lora(places, torch.cat([lora.at(places).flat_EP for lora in loras]))


class _Gathered(NamedTuple):
    """Which tokens each LoRA multiplies, and where what it adds goes."""

    from_N: Tensor  # tokens by target, padded to the largest number
    changed_M: Tensor  # tokens that some LoRA changes
    place_M: Tensor  # where those are among the N


class LoraRows:
    """The LoRA that each row of a forward call has."""

    def __init__(
        self,
        loras: Sequence[Lora],
        which: Sequence[int],
        num_tokens: int,
        device: torch.device,
        stack: Callable[[], Lora] | None = None,
    ) -> None:
        """`which[b]` is the index of row b's LoRA, -1 for none; each row has `num_tokens` tokens.

        `stack` gives the `loras` side by side, for those that multiply with all of them at once; None: made anew.
        """
        self.loras, self.which = tuple(loras), tuple(which)
        self._num_tokens, self._device, self._make = num_tokens, device, stack

    @functools.cached_property
    def stack(self) -> Lora:
        """The LoRAs side by side."""
        return stack_loras(self.loras) if self._make is None else self._make()

    @functools.cached_property
    def _members(self) -> list[list[int]]:
        which = self.which
        return [
            [row for row, one in enumerate(which) if one == index] for index in range(self.stack.num_targets)
        ]

    @functools.cached_property
    def _in_line(self) -> bool:
        """Whether rows stand by target in equal numbers: then they are a view."""
        members, total = self._members, len(self.which)
        most = max(map(len, members))
        ordered = [row for rows in members for row in rows] == list(range(most * len(members)))
        return ordered and total == most * len(members)

    @functools.cached_property
    def _gathered(self) -> _Gathered:
        members, device, num = self._members, self._device, self._num_tokens
        most, token_T = max(map(len, members)), torch.arange(num, device=device)

        def tokens_of(rows: list[int]) -> Tensor:
            return (torch.tensor(rows, device=device)[:, None] * num + token_T).view(-1)

        places = [e * most + i for e, rows in enumerate(members) for i in range(len(rows))]
        padded = [row for rows in members for row in (*rows, *[0] * (most - len(rows)))]
        changed = [row for rows in members for row in rows]
        return _Gathered(tokens_of(padded), tokens_of(changed), tokens_of(places))

    def add(self, layer: int, part: Part, x_MX: Tensor, y_MY: Tensor) -> Tensor:
        """y with each row's delta of x added in place."""
        delta, num = self.stack.delta(layer, part), self.stack.num_targets
        if delta is None:
            return y_MY
        if self._in_line and num == 1:
            return y_MY.addmm_(torch.mm(x_MX, delta.down_EXR[0]), delta.up_ERY[0])
        if self._in_line:
            z_ENR = torch.bmm(x_MX.view(num, -1, x_MX.shape[1]), delta.down_EXR)
            y_MY.view(num, -1, y_MY.shape[1]).baddbmm_(z_ENR, delta.up_ERY)
            return y_MY
        tokens = self._gathered
        z_ENR = torch.bmm(x_MX[tokens.from_N].view(num, -1, x_MX.shape[1]), delta.down_EXR)
        added_NY = torch.bmm(z_ENR, delta.up_ERY).flatten(0, 1)
        return y_MY.index_add_(0, tokens.changed_M, added_NY[tokens.place_M])
