# M rows, X inputs, Y outputs, H hidden, F mlp width, B sequences, T tokens of each, S positions read, D head size
# N query heads, G key/value heads, P heads a token keeps, L lanes, I inputs that lie side by side
"""The decoding step's own kernels for the CPU (farm/layers/cpu), called on tensors.

A step of few rows is bound by how fast weights are read and by the number of operators. torch's products reach half
of the memory's speed, its attention of single queries less. Where there is no C++ compiler, or FARM_KERNELS=off, there
are no kernels and torch's operators compute the same, slower.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from farm.layers.compile import compiled

INPUTS = {torch.float32: 1, torch.bfloat16: 2}  # that lie side by side in a block
HEAD_SIZES = (16, 32, 64, 96, 128)
FORMS = {"as they are": 0, "gated": 1, "apart": 2}


def fields(pointers: str, numbers: str) -> list[tuple[str, Any]]:
    of_pointers = [(name, ctypes.c_void_p) for name in pointers.split()]
    return of_pointers + [(name, ctypes.c_int64) for name in numbers.split()]


class Attention(ctypes.Structure):
    """Mirrors the struct of the same name in cpu/attention.h."""

    _fields_ = fields(
        "q k v mask last out",
        "sequences tokens kv_heads group size context q_sequence q_token kv_sequence kv_head mask_sequence mask_row",
    )


class Visible(NamedTuple):
    """What the tokens of a call see of the cache: the entries up to one each, or what an additive mask shows."""

    last_BT: Tensor | None = None  # int64
    mask: Tensor | None = None  # [B, 1, R * T, S], or a row for all, [B, 1, 1, S]; neither: all is seen

    def check(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """That it is one of B x T tokens over S entries, as the kernels read it."""
        b, t, s = shape
        if self.last_BT is not None:
            assert self.last_BT.is_contiguous()
            assert self.last_BT.shape == (b, t)
        elif self.mask is not None:
            assert self.mask.dtype == dtype
            assert self.mask.shape[0] == b
            assert self.mask.shape[2] == 1 or self.mask.shape[2] % t == 0
            assert self.mask.shape[3] == s
            assert self.mask.stride(3) == 1

    def steps(self, num_tokens: int) -> list[Visible]:
        """Of each of the T tokens a row alone."""
        if self.last_BT is not None:
            return [Visible(last_BT=last_B[:, None]) for last_B in self.last_BT.t().contiguous()]
        if self.mask is None:
            return [Visible()] * num_tokens
        of_tokens = self.mask.unflatten(2, (-1, num_tokens)).movedim(3, 0).contiguous()
        return [Visible(mask=mask) for mask in of_tokens]

    def strides(self) -> tuple[int, int]:
        """Of the mask, from sequence to sequence and from query to query."""
        if self.mask is None:
            return 0, 0
        return self.mask.stride(0), 0 if self.mask.shape[2] == 1 else self.mask.stride(2)


class Kernels:
    """The compiled functions on tensors. Shapes are the caller's word; what is read as memory is checked."""

    def __init__(self, path: Path) -> None:
        # Long calls let other Python threads run; for short ones handing the lock over would cost more.
        free, held = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        pointer, number, real, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
        declared = {
            "linear": (free, [*[pointer] * 5, *[number] * 4, threads]),
            "attend": (free, [pointer, threads]),
            "decode": (free, [pointer, pointer, threads]),
            "foretell": (free, [*[pointer] * 3, threads]),
            "chain": (free, [*[pointer] * 4, threads]),
            "rms_norm": (held, [*[pointer] * 3, number, number, real, threads]),
            "swiglu": (held, [pointer, pointer, number, number, threads]),
            "rotate": (held, [*[pointer] * 4, *[number] * 4, threads]),
        }
        self.lanes: int = _declared(held, "lanes", [], number)()  # of a vector; a block of weights has two
        self._calls: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for name, (library, arguments) in declared.items():
            for dtype in INPUTS:
                self._calls[name, dtype] = _declared(library, f"{name}_{str(dtype)[6:]}", arguments)
        self._keep = _declared(
            held, "keep_bytes", [pointer, number, pointer, pointer, *[number] * 3, threads]
        )

    def linear(
        self,
        x_MX: Tensor,
        weights: Tensor,
        num_outputs: int,
        bias_Y: Tensor | None = None,
        residual_MY: Tensor | None = None,
        form: str = "as they are",
    ) -> Tensor:
        """x W^T (+ b) (+ residual), [M, Y], of weights as `pack` lays them; of `pack_pair`'s in one of the other forms.

        "gated" gives silu(G x) * (U x), [M, Y / 2]; "apart" G x beside U x, [M, Y].
        """
        assert x_MX.dtype == weights.dtype
        assert x_MX.shape[1] == weights.shape[1] * weights.shape[3]
        x_MX, rows = x_MX.contiguous(), x_MX.shape[0]
        y = x_MX.new_empty(rows, num_outputs // 2 if form == "gated" else num_outputs)
        assert bias_Y is None or (bias_Y.dtype, bias_Y.shape) == (y.dtype, (num_outputs,))
        if residual_MY is not None:
            assert residual_MY.shape == y.shape
            assert residual_MY.dtype == y.dtype
            residual_MY = residual_MY.contiguous()
        self._calls["linear", x_MX.dtype](
            x_MX.data_ptr(), weights.data_ptr(), address(bias_Y), address(residual_MY), y.data_ptr(),
            rows, x_MX.shape[1], num_outputs, FORMS[form], torch.get_num_threads(),
        )  # fmt: skip
        return y

    def rms_norm(self, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 between reading and writing."""
        x, width = x.contiguous(), x.shape[-1]
        assert weight_H.shape == (width,)
        assert weight_H.dtype == x.dtype
        y, rows = torch.empty_like(x), x.numel() // width
        call = self._calls["rms_norm", x.dtype]
        call(x.data_ptr(), weight_H.data_ptr(), y.data_ptr(), rows, width, eps, torch.get_num_threads())
        return y

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(first half) * second half of the last dimension, [..., F] of [..., 2 F]."""
        gate_up, width = gate_up.contiguous(), gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], width)
        call = self._calls["swiglu", y.dtype]
        call(gate_up.data_ptr(), y.data_ptr(), y.numel() // width, width, torch.get_num_threads())
        return y

    def rotate_(
        self, qkv_BTND: Tensor, tables: tuple[Tensor, Tensor], positions_BT: Tensor, rotated: int
    ) -> None:
        """Turns the first heads of every token in place by cos and sin [S, D]; sin is negated in its first half."""
        b, t, heads, size = qkv_BTND.shape
        check_tables(tables, size, qkv_BTND.dtype)
        assert qkv_BTND.is_contiguous()
        assert positions_BT.is_contiguous()
        assert positions_BT.shape == (b, t)
        addresses = (qkv_BTND.data_ptr(), *(table.data_ptr() for table in tables), positions_BT.data_ptr())
        self._calls["rotate", qkv_BTND.dtype](
            *addresses, b * t, heads, rotated, size, torch.get_num_threads()
        )  # fmt: skip

    def keep(self, kv_BTPD: Tensor, entries_BTP: Tensor, layer: Tensor) -> None:
        """Copies each head's vector to the entry of a layer [entries, D] that is named for it."""
        b, t, heads, size = kv_BTPD.shape
        row = kv_BTPD.stride(1)
        if kv_BTPD.stride() != (t * row, row, size, 1):
            kv_BTPD, row = kv_BTPD.contiguous(), heads * size  # of one token a stride may be any number
        assert entries_BTP.is_contiguous()
        assert layer.is_contiguous()
        assert layer.dtype == kv_BTPD.dtype
        width = kv_BTPD.itemsize
        self._keep(
            kv_BTPD.data_ptr(), row * width, entries_BTP.data_ptr(), layer.data_ptr(), b * t, heads,
            size * width, torch.get_num_threads(),
        )  # fmt: skip

    def attend(self, q_BTND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible: Visible) -> Tensor:
        """Softmax attention [B, T, N * D]."""
        b, t, n, d = q_BTND.shape
        g, s = k_BGSD.shape[1:3]
        assert q_BTND.stride()[2:] == k_BGSD.stride()[2:] == (d, 1)
        assert k_BGSD.stride() == v_BGSD.stride()
        assert q_BTND.dtype == k_BGSD.dtype == v_BGSD.dtype
        assert d in HEAD_SIZES
        visible.check((b, t, s), q_BTND.dtype)
        out = q_BTND.new_empty(b, t, n * d)
        task = Attention(
            q_BTND.data_ptr(), k_BGSD.data_ptr(), v_BGSD.data_ptr(), address(visible.mask),
            address(visible.last_BT), out.data_ptr(),
            b, t, g, n // g, d, s, *q_BTND.stride()[:2], *k_BGSD.stride()[:2], *visible.strides(),
        )  # fmt: skip
        self._calls["attend", q_BTND.dtype](ctypes.addressof(task), torch.get_num_threads())
        return out

    def run(self, name: str, dtype: torch.dtype, *structs: ctypes.Structure) -> None:
        """Runs layers that the structs of farm/layers/decoder.py describe."""
        self._calls[name, dtype](*map(ctypes.addressof, structs), torch.get_num_threads())


def check_tables(tables: tuple[Tensor, Tensor], size: int, dtype: torch.dtype) -> None:
    """That cos and sin are as the kernels read them."""
    for table in tables:
        assert table.is_contiguous()
        assert table.shape[1] == size
        assert table.dtype == dtype


def pack(weight_YX: Tensor) -> Tensor:
    """A weight as `linear` reads it, [Y / 2 L, X / I, 2 L, I]: blocks of outputs, padded with zeros."""
    outputs, inputs = weight_YX.shape
    beside, block = INPUTS[weight_YX.dtype], 2 * kernels().lanes
    padded_YX = functional.pad(weight_YX, (0, 0, 0, -outputs % block))
    return padded_YX.view(-1, block, inputs // beside, beside).transpose(1, 2).contiguous()


def pack_pair(gate_FX: Tensor, up_FX: Tensor) -> Tensor:
    """Two weights of one shape, as `linear` reads them in the forms "gated" and "apart": L outputs of each a block."""
    lanes = kernels().lanes
    beside = -gate_FX.shape[0] % lanes
    pair = [
        functional.pad(weight, (0, 0, 0, beside)).unflatten(0, (-1, lanes)) for weight in (gate_FX, up_FX)
    ]
    return pack(torch.stack(pair, dim=1).flatten(0, 2))


def kernels_for(tensor: Tensor) -> Kernels | None:
    """The kernels where they read tensors of this dtype and device."""
    return available() if tensor.dtype in INPUTS and tensor.device.type == "cpu" else None


def multiplies(weight_YX: Tensor) -> bool:
    """Whether a weight may be laid out for `linear`."""
    return kernels_for(weight_YX) is not None and weight_YX.shape[1] % INPUTS[weight_YX.dtype] == 0


def kernels() -> Kernels:
    """The kernels, for who has weights that are laid out for them."""
    own = available()
    assert own is not None
    return own


@functools.cache
def available() -> Kernels | None:
    """The kernels of this machine, compiled at the first call; None where they are off or cannot be compiled."""
    if os.environ.get("FARM_KERNELS", "on") == "off":
        return None
    try:
        return Kernels(compiled())
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(
            f"decoding on the CPU goes without its own kernels and is slower: {said}\n"
            "Install a C++ compiler (g++), or name one in CXX; FARM_KERNELS=off says that this is meant.",
            stacklevel=2,
        )
        return None


def _declared(library: Any, name: str, arguments: list[Any], returns: Any = None) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(library, name)
    function.argtypes, function.restype = arguments, returns  # type: ignore[attr-defined]
    return function


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
