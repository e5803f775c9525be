"""What decoding computes with packed weights and merged operators is what the plain operators compute."""

import pytest
import torch
from torch.nn import functional

from farm.layers.dense import FEW_ROWS, PACKED_ABOVE_BYTES, Dense, RmsNorm, can_pack, swiglu

SMALL, LARGE = (96, 64), (768, 576)  # [Y, X]: below and above what is packed
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("biased", [False, True])
def test_a_dense_map_is_the_linear_map_of_its_weight(
    dtype: torch.dtype, shape: tuple[int, int], biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if biased else None
    dense = Dense.of(weight, bias)
    assert dense.packed == (weight.nbytes > PACKED_ABOVE_BYTES and can_pack(dtype))
    assert dense.packed or dense.weight.is_contiguous(), "a small weight is read inputs first"
    assert dense.num_bytes == weight.nbytes
    for num_rows in (1, 3, 8, 33):
        x = torch.randn(num_rows, shape[1], generator=generator).to(dtype)
        residual = torch.randn(num_rows, shape[0], generator=generator).to(dtype)
        expected = functional.linear(x, weight, bias)
        torch.testing.assert_close(dense(x), expected, atol=TOLERANCE[dtype], rtol=1e-2)
        torch.testing.assert_close(
            dense.add_to(residual, x), residual + expected, atol=TOLERANCE[dtype], rtol=1e-2
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
@pytest.mark.parametrize("num_rows", [1, 5, FEW_ROWS])
def test_rms_norm_is_torchs_at_every_scale(dtype: torch.dtype, scale: float, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(2, num_rows, 64, generator=generator) * scale).to(dtype)
    weight = torch.randn(64, generator=generator).to(dtype)
    expected = functional.rms_norm(x, (64,), weight, 1e-5)
    torch.testing.assert_close(RmsNorm.of(weight, 1e-5)(x), expected)
    torch.testing.assert_close(RmsNorm.of(weight, 1e-5)(torch.zeros_like(x)), torch.zeros_like(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(8, 32), (1024, 512)], ids=["small", "packed"])
def test_halves_are_the_two_halves_of_the_product(sizes: tuple[int, int], bias: bool) -> None:
    inputs, outputs = sizes
    weight, bias_Y = torch.randn(outputs, inputs), torch.randn(outputs) if bias else None
    dense = Dense.of(weight, bias_Y)
    for num_rows in (1, 3, 8):
        x = torch.randn(num_rows, inputs)
        first, second = dense.halves(x).unbind(0)
        got = torch.cat((first, second), dim=1)
        torch.testing.assert_close(got, functional.linear(x, weight, bias_Y), atol=1e-3, rtol=1e-4)


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    x, gate, up = torch.randn(3, 8), torch.randn(16, 8), torch.randn(16, 8)
    got = swiglu(*Dense.of(torch.cat((gate, up))).halves(x).unbind(0))
    torch.testing.assert_close(got, functional.silu(x @ gate.T) * (x @ up.T))
