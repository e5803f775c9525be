# R rank, X inputs, Y outputs
"""What the rows of one call of a decoder have of their own: LoRAs over its products, and an MLP each."""

from __future__ import annotations

import ctypes
import itertools
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from farm.layers.dense import Dense, Gated
from farm.layers.kernels import fields, kernels
from farm.layers.lora import Delta, Lora, LoraRows, Part

# The products of a layer and the one in front of a draft's, in the order of cpu/lora.h.
PARTS: tuple[Part, ...] = ("qkv", "out", "gate_up", "down", "fc")


class Mlp(ctypes.Structure):
    """Mirrors the struct of the same name in cpu/decoder.h."""

    _fields_ = fields("gate_up down", "width")

    @classmethod
    def of(cls, gated: Gated, down: Dense) -> Mlp:
        return cls(gated.gate_up.weight.data_ptr(), down.weight.data_ptr(), gated.gate_up.num_outputs // 2)


class _Factors(ctypes.Structure):
    _fields_ = fields("down up spans", "rank num_spans")


class ByRow(NamedTuple):
    """A row each, or none: changes to the products of the layers, and a gated MLP behind their own."""

    loras: LoraRows | None = None
    mlps: Sequence[tuple[Gated, Dense]] = ()

    @property
    def widest(self) -> int:
        """Of the MLPs."""
        return max((gated.gate_up.num_outputs // 2 for gated, _ in self.mlps), default=0)


class Tables:
    """Finds the addresses of what rows have of their own; those of a LoRA are worked out once."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._factors: WeakKeyDictionary[Lora, Any] = WeakKeyDictionary()

    def attach(self, call: Any, by_row: ByRow, num_rows: int, dtype: torch.dtype) -> None:
        """Makes it a part of a call of the kernels, which keeps alive what it points to."""
        if by_row.loras is not None:
            rows = by_row.loras
            assert len(rows.which) == num_rows
            assert all(one.flat_EP.dtype == dtype for one in rows.loras)
            tables = [ctypes.addressof(self._of(one)) for one in rows.loras]
            call.kept_loras = _pointers([tables[i] if i >= 0 else None for i in rows.which])
            call.loras = ctypes.addressof(call.kept_loras)
        if by_row.mlps:
            assert len(by_row.mlps) == num_rows
            assert all(
                part.layout == "kernels" for gated, down in by_row.mlps for part in (gated.gate_up, down)
            )
            call.kept_mlps = [Mlp.of(*pair) for pair in by_row.mlps]
            call.kept_own = _pointers([ctypes.addressof(one) for one in call.kept_mlps])
            call.own = ctypes.addressof(call.kept_own)

    def _of(self, lora: Lora) -> Any:
        """[layers, parts]; the addresses are of what the LoRA holds."""
        if lora not in self._factors:
            deltas = [lora.delta(layer, part) for layer in range(self._num_layers) for part in PARTS]
            every = [_Factors() if one is None else _factors(one) for one in deltas]
            table = (_Factors * len(every))(*every)
            table.kept = every  # their spans
            self._factors[lora] = table
        return self._factors[lora]


def _pointers(addresses: Sequence[int | None]) -> Any:
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _factors(delta: Delta) -> _Factors:
    assert delta.down_EXR.shape[0] == 1
    assert delta.down_EXR.is_contiguous()
    assert delta.up_ERY.is_contiguous()
    spans = array("q", _spans(delta.up_ERY[0]))
    addresses = delta.down_EXR.data_ptr(), delta.up_ERY.data_ptr(), spans.buffer_info()[0]
    found = _Factors(*addresses, delta.up_ERY.shape[1], len(spans) // 4)
    found.kept = spans
    return found


def _spans(up_RY: Tensor) -> Iterator[int]:
    """First and last rank, first and last output, of each run of ranks that reach the same whole vectors of outputs."""
    (num_ranks, width), some_RY = up_RY.shape, (up_RY != 0).to(torch.uint8)
    lanes = kernels().lanes
    firsts = (some_RY.argmax(dim=1) // lanes * lanes).tolist()
    lasts = (width - some_RY.flip(1).argmax(dim=1)).tolist()
    reached = [
        (first, min(width, -(-last // lanes) * lanes)) for first, last in zip(firsts, lasts, strict=True)
    ]
    for outputs, ranks in itertools.groupby(range(num_ranks), key=reached.__getitem__):
        run = list(ranks)
        yield from (run[0], run[-1] + 1, *outputs)
