# M rows, X inputs, Y outputs, H hidden, F mlp width
"""Linear maps, norm and gated product as decoding runs them, without gradients.

A decoding step reads every weight for a handful of rows, so it lives on how fast weights are read. On a CPU they are
laid out for the farm's own kernels (farm/layers/kernels.py), once, when a model is opened; where there are none a large
weight goes to oneDNN in its blocked layout, about twice as fast as a row-major matrix, and a small one stands as
[inputs, outputs].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from farm.layers.kernels import kernels, kernels_for, multiplies, pack, pack_pair

# Smaller weights stay in a cache, where calling oneDNN costs more than it gains.
PACKED_ABOVE_BYTES = 512 * 2**10


@dataclass(frozen=True)
class Dense:
    """y = x W^T + b. `weight` is W^T [X, Y] where plain, otherwise as its reader wants it; on the CPU a copy."""

    weight: Tensor
    bias: Tensor | None
    layout: Literal["plain", "onednn", "kernels"]
    num_outputs: int
    num_bytes: int

    @classmethod
    def of(cls, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Dense:
        """Lays the weight out anew on the CPU; the caller's tensor may then be dropped."""
        weight_YX = weight_YX.detach()
        sizes = weight_YX.shape[0], weight_YX.nbytes
        if weight_YX.device.type != "cpu":
            return cls(weight_YX.t(), bias_Y, "plain", *sizes)
        if multiplies(weight_YX):
            return cls(pack(weight_YX), bias_Y, "kernels", *sizes)
        if weight_YX.nbytes <= PACKED_ABOVE_BYTES or not can_pack(weight_YX.dtype):
            return cls(weight_YX.t().contiguous(), bias_Y, "plain", *sizes)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_YX.contiguous(), 1)
        return cls(packed, bias_Y, "onednn", *sizes)

    def __call__(self, x_MX: Tensor) -> Tensor:
        """[M, Y] of x [M, X]."""
        out: Tensor
        if self.layout == "kernels":
            return kernels().linear(x_MX, self.weight, self.num_outputs, self.bias)
        if self.layout == "onednn":
            out = torch.ops.mkldnn._linear_pointwise.default(x_MX, self.weight, self.bias, "none", [], "")
            return out
        if self.bias is not None:
            return torch.addmm(self.bias, x_MX, self.weight)
        return torch.mm(x_MX, self.weight)

    def add_to(self, residual_MY: Tensor, x_MX: Tensor) -> Tensor:
        """residual + x W^T + b, the sum taken by the product."""
        out: Tensor
        if self.layout == "kernels":
            return kernels().linear(x_MX, self.weight, self.num_outputs, self.bias, residual_MY)
        if self.layout == "onednn":
            out = torch.ops.mkldnn._linear_pointwise.binary(x_MX, residual_MY, self.weight, self.bias, "add")
            return out
        if self.bias is not None:
            residual_MY = residual_MY + self.bias
        return torch.addmm(residual_MY, x_MX, self.weight)


@dataclass(frozen=True)
class Gated:
    """silu(G x) * (U x), both products at once (SwiGLU, arXiv 2002.05202, eq. 6)."""

    gate_up: Dense  # G and U [2 F, X]; for kernels in one piece that yields the gated product

    @property
    def num_bytes(self) -> int:
        return self.gate_up.num_bytes

    @classmethod
    def of(cls, gate_FX: Tensor, up_FX: Tensor) -> Gated:
        """Lays the weights out anew on the CPU."""
        if multiplies(gate_FX):
            packed, sizes = (
                pack_pair(gate_FX.detach(), up_FX.detach()),
                (2 * gate_FX.shape[0], 2 * gate_FX.nbytes),
            )
            return cls(Dense(packed, None, "kernels", *sizes))
        return cls(Dense.of(torch.cat((gate_FX, up_FX))))

    def __call__(self, x_MX: Tensor) -> Tensor:
        """[M, F] of x [M, X]."""
        if self.gate_up.layout == "kernels":
            return kernels().linear(x_MX, self.gate_up.weight, self.gate_up.num_outputs, form="gated")
        return swiglu(self.gate_up(x_MX))

    def apart(self, x_MX: Tensor) -> Tensor:
        """G x beside U x, [M, 2 F], for who changes them before `swiglu`."""
        if self.gate_up.layout == "kernels":
            return kernels().linear(x_MX, self.gate_up.weight, self.gate_up.num_outputs, form="apart")
        return self.gate_up(x_MX)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have oneDNN's linear for the dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or (dtype == torch.bfloat16 and supported)


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); the root in float32."""

    weight_H: Tensor
    eps: float

    @classmethod
    def of(cls, weight_H: Tensor, eps: float) -> RmsNorm:
        return cls(weight_H.detach(), eps)

    def __call__(self, x: Tensor) -> Tensor:
        own = kernels_for(x)
        if own is not None:
            return own.rms_norm(x, self.weight_H, self.eps)
        return functional.rms_norm(x, (x.shape[-1],), self.weight_H, self.eps)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) * second half of the last dimension, [..., F] of [..., 2 F]."""
    own = kernels_for(gate_up)
    if own is not None:
        return own.swiglu(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)
