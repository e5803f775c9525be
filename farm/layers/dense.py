# M rows, X inputs, Y outputs, H hidden, F mlp width
"""Linear maps, norm and gated product as decoding runs them, without gradients.

A decoding step reads every weight for a handful of rows, so it lives on how fast weights are read. On a CPU oneDNN
reads a large weight in its own blocked layout about twice as fast as a row-major matrix, and a small one is read faster
as [inputs, outputs] than as the checkpoint has it. The layout is made once, when a model is opened.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Smaller weights stay in a cache, where calling oneDNN costs more than it gains.
PACKED_ABOVE_BYTES = 512 * 2**10
FEW_ROWS = 32


@dataclass(frozen=True)
class Dense:
    """y = x W^T + b. `weight` is W^T [X, Y], or opaque where `packed`; on the CPU a copy of the checkpoint's tensor."""

    weight: Tensor
    bias: Tensor | None
    packed: bool
    num_bytes: int

    @classmethod
    def of(cls, weight_YX: Tensor, bias_Y: Tensor | None = None) -> Dense:
        """Lays the weight out anew on the CPU; the caller's tensor may then be dropped."""
        weight_YX = weight_YX.detach()
        if weight_YX.device.type != "cpu":
            return cls(weight_YX.t(), bias_Y, False, weight_YX.nbytes)
        if weight_YX.nbytes <= PACKED_ABOVE_BYTES or not can_pack(weight_YX.dtype):
            return cls(weight_YX.t().contiguous(), bias_Y, False, weight_YX.nbytes)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_YX.contiguous(), 1)
        return cls(packed, bias_Y, True, weight_YX.nbytes)

    def __call__(self, x_MX: Tensor) -> Tensor:
        """[M, Y] of x [M, X]."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
                x_MX, self.weight, self.bias, "none", [], ""
            )
            return out
        if self.bias is not None:
            return torch.addmm(self.bias, x_MX, self.weight)
        return torch.mm(x_MX, self.weight)

    def halves(self, x_MX: Tensor) -> Tensor:
        """The first and the second half of the outputs, [2, M, Y / 2]. Y is even.

        The library runs a small product of several rows on one core, however many there are, but two of a batch on two.
        """
        whole = self.packed or self.bias is not None or self.weight.device.type != "cpu"
        if whole or x_MX.shape[0] == 1:
            return self(x_MX).unflatten(1, (2, -1)).transpose(0, 1)
        halves_2XY = self.weight.view(self.weight.shape[0], 2, -1).transpose(0, 1)
        return torch.bmm(x_MX.expand(2, -1, -1), halves_2XY)

    def add_to(self, residual_MY: Tensor, x_MX: Tensor) -> Tensor:
        """residual + x W^T + b, the sum taken by the product."""
        if self.packed:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.binary(
                x_MX, residual_MY, self.weight, self.bias, "add"
            )
            return out
        if self.bias is not None:
            residual_MY = residual_MY + self.bias
        return torch.addmm(residual_MY, x_MX, self.weight)


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have oneDNN's linear for the dtype."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or (dtype == torch.bfloat16 and supported)


@dataclass(frozen=True)
class RmsNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467); the root in float32.

    On a CPU `torch.rms_norm` is a chain of small operators, a tenth of a decoding step. In float32 a norm does with
    fewer of them. In bfloat16 the layer norm of (x, -x), one operator, is the same: its mean is 0, its variance
    mean(x^2). That costs twice the bytes, which many rows would feel.
    """

    weight_H: Tensor
    eps: float
    of_few: Tensor | None = None  # the weight twice, [2 H], in bfloat16 on the CPU
    # H eps in float32 on the CPU; a Python number would be cast in every call.
    under_root: Tensor | None = None

    @classmethod
    def of(cls, weight_H: Tensor, eps: float) -> RmsNorm:
        weight_H = weight_H.detach()
        if weight_H.device.type != "cpu" or weight_H.dtype not in (torch.float32, torch.bfloat16):
            return cls(weight_H, eps)
        if weight_H.dtype == torch.bfloat16:
            return cls(weight_H, eps, of_few=weight_H.repeat(2))
        # x / sqrt(|x|^2 / H + eps) is sqrt(H) x / sqrt(|x|^2 + H eps): the first factor goes into the weight.
        size = weight_H.shape[0]
        return cls(weight_H * size**0.5, eps, under_root=torch.tensor([eps * size]))

    def __call__(self, x: Tensor) -> Tensor:
        if self.under_root is not None:
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            return x.mul(torch.addcmul(self.under_root, norm, norm).rsqrt_()).mul_(self.weight_H)
        size = x.shape[-1]
        if self.of_few is not None and x.numel() <= FEW_ROWS * size:
            mirrored = torch.cat((x, x.neg()), dim=-1)
            return functional.layer_norm(mirrored, (2 * size,), self.of_few, None, self.eps)[..., :size]
        return functional.rms_norm(x, (size,), self.weight_H, self.eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(gate).mul_(up)
