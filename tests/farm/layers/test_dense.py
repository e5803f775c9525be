"""What decoding computes with weights laid out anew is what the plain operators compute, with and without kernels."""

import pytest
import torch
from torch.nn import functional

from farm.layers.dense import PACKED_ABOVE_BYTES, Dense, Gated, RmsNorm, can_pack, swiglu

SMALL, LARGE = (96, 64), (768, 576)  # [Y, X]: below and above what oneDNN gets
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float64: 1e-12}


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the farm's own kernels, and where there are none."""
    if request.param == "torch":
        monkeypatch.setattr("farm.layers.kernels.available", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("biased", [False, True])
def test_a_dense_map_is_the_linear_map_of_its_weight(
    way: str, dtype: torch.dtype, shape: tuple[int, int], biased: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if biased else None
    dense = Dense.of(weight, bias)
    large = weight.nbytes > PACKED_ABOVE_BYTES and can_pack(dtype)
    layout = "kernels" if way == "kernels" and dtype != torch.float64 else "onednn" if large else "plain"
    assert dense.layout == layout
    assert dense.layout != "plain" or dense.weight.is_contiguous(), "a small weight is read inputs first"
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
@pytest.mark.parametrize("num_rows", [1, 5, 32])
def test_rms_norm_is_torchs_at_every_scale(way: str, dtype: torch.dtype, scale: float, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(2, num_rows, 64, generator=generator) * scale).to(dtype)
    weight = torch.randn(64, generator=generator).to(dtype)
    expected = functional.rms_norm(x, (64,), weight, 1e-5)
    torch.testing.assert_close(RmsNorm.of(weight, 1e-5)(x), expected)
    torch.testing.assert_close(RmsNorm.of(weight, 1e-5)(torch.zeros_like(x)), torch.zeros_like(x))


@pytest.mark.parametrize("width", [8, 16, 40, 1536])
def test_a_gated_product_is_silu_of_the_gate_times_up(way: str, width: int) -> None:
    x, gate, up = torch.randn(3, 64), torch.randn(width, 64) / 8, torch.randn(width, 64) / 8
    expected = functional.silu(x @ gate.T) * (x @ up.T)
    gated = Gated.of(gate, up)
    assert gated.num_bytes == gate.nbytes + up.nbytes
    torch.testing.assert_close(gated(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gated.apart(x), torch.cat((x @ gate.T, x @ up.T), 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(swiglu(gated.apart(x)), expected, atol=1e-5, rtol=1e-5)
    assert gated.apart(x).data_ptr() != gated.apart(x).data_ptr(), "a LoRA adds to it in place"
