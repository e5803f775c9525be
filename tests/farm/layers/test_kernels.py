"""The kernels compute what float64 says, a row as if it were alone, and are not missed where they cannot be had."""

import timeit
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from farm.layers import compile as build
from farm.layers.attention import Rotation, attend, attend_cached, fold_mask, rotate, signed
from farm.layers.kernels import HEAD_SIZES, Kernels, Visible, available, pack, pack_pair

KERNELS = available()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C++ compiler")
DTYPES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # with the error allowed, a share of the largest number


def own() -> Kernels:
    assert KERNELS is not None
    return KERNELS


def assert_close_to(got: Tensor, expected: Tensor) -> None:
    error, largest = (got.double() - expected).abs().max(), expected.abs().max()
    assert error <= DTYPES[got.dtype] * (1 + largest), f"off by {error} of {largest}"


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


sizes = st.integers(1, 70)


@settings(max_examples=40)
@given(sizes, sizes, sizes, st.sampled_from(list(DTYPES)), st.booleans(), st.booleans())
def test_a_product_is_the_linear_map_for_any_sizes(
    rows: int, half: int, outputs: int, dtype: torch.dtype, biased: bool, added: bool
) -> None:
    inputs = 2 * half
    x, weight = normal(rows, inputs, dtype=dtype), normal(outputs, inputs, dtype=dtype)
    bias = normal(outputs, dtype=dtype) if biased else None
    residual = normal(rows, outputs, dtype=dtype) if added else None
    expected = x.double() @ weight.double().T
    expected = (
        expected + (0 if bias is None else bias.double()) + (0 if residual is None else residual.double())
    )
    assert_close_to(own().linear(x, pack(weight), outputs, bias, residual), expected)


def test_a_vector_of_the_kernels_is_a_register() -> None:
    """Wider ones a compiler keeps in memory: then a product takes twenty times as long, and nothing else tells."""
    x, weight = normal(8, 512, dtype=torch.float32), normal(1024, 512, dtype=torch.float32)
    packed = pack(weight)

    def fastest(call: Callable[[], Tensor]) -> float:
        return min(timeit.repeat(call, number=10, repeat=20))

    assert fastest(lambda: own().linear(x, packed, 1024)) < 4 * fastest(lambda: functional.linear(x, weight))


@settings(max_examples=40)
@given(sizes, sizes, sizes, st.sampled_from(list(DTYPES)))
def test_a_gated_product_is_that_of_both_weights(
    rows: int, half: int, width: int, dtype: torch.dtype
) -> None:
    inputs = 2 * half
    x = normal(rows, inputs, dtype=dtype)
    gate, up = (normal(width, inputs, dtype=dtype) * inputs**-0.5 for _ in range(2))
    g, u = x.double() @ gate.double().T, x.double() @ up.double().T
    weights = pack_pair(gate, up)
    assert_close_to(own().linear(x, weights, 2 * width, form="gated"), functional.silu(g) * u)
    assert_close_to(own().linear(x, weights, 2 * width, form="apart"), torch.cat((g, u), dim=1))


def test_silu_keeps_its_value_where_exponentials_leave_floats() -> None:
    gate = torch.tensor([[-300.0, -90.0, -87.5, -20.0, -0.0, 1e-30, 20.0, 90.0, 300.0]])
    got = own().swiglu(torch.cat((gate, torch.ones_like(gate)), dim=1))
    torch.testing.assert_close(got, functional.silu(gate), atol=1e-30, rtol=1e-6)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(1, 4)),
    st.sampled_from(HEAD_SIZES), st.integers(0, 150), st.sampled_from(list(DTYPES)), st.randoms(use_true_random=False),
)  # fmt: skip
def test_attention_reads_what_its_mask_shows(
    sizes: tuple[int, int, int, int], d: int, before: int, dtype: torch.dtype, random: Random
) -> None:
    (b, t, g, r), s = sizes, before + sizes[1]
    qkv = normal(b, t, g * r + 2 * g, d, dtype=dtype)
    cache = normal(b, 2 * g, s + 3, d, dtype=dtype)
    q, k, v = qkv[:, :, : g * r], cache[:, :g, :s], cache[:, g:, :s]
    last_seen_BT1 = torch.tensor([[[random.randrange(s)] for _ in range(t)] for _ in range(b)])
    first_seen_BT1 = torch.where(torch.rand(b, t, 1) < 0.5, 0, last_seen_BT1 - random.randrange(s))
    between_BTS = (torch.arange(s) >= first_seen_BT1) & (torch.arange(s) <= last_seen_BT1)
    seen_BTS = (between_BTS & (torch.rand(b, t, s) < 0.8)).scatter(2, last_seen_BT1, True)
    mask = fold_mask(torch.where(seen_BTS, 0.0, -torch.inf).to(dtype)[:, None], r)
    assert_close_to(
        own().attend(q, k, v, Visible(mask=mask)), attend(q.double(), k.double(), v.double(), mask.double())
    )
    assert_close_to(own().attend(q, k, v, Visible()), attend(q.double(), k.double(), v.double(), None))


@pytest.mark.parametrize("told", ["by a mask", "by number"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_behind_the_last_position_seen_is_read(dtype: torch.dtype, told: str) -> None:
    q, kv = normal(2, 1, 4, 32, dtype=dtype), normal(2, 2, 90, 32, dtype=dtype)
    mask = torch.where(torch.arange(90) > torch.tensor([[5], [70]]), -torch.inf, 0.0).to(dtype)[:, None, None]
    visible = Visible(mask=mask) if told == "by a mask" else Visible(last_BT=torch.tensor([[5], [70]]))
    expected = attend(*(x.double() for x in (q, kv[:, :1], kv[:, 1:], mask)))
    assert_close_to(own().attend(q, kv[:, :1], kv[:, 1:], visible), expected)
    expected = own().attend(q, kv[:, :1], kv[:, 1:], visible)
    kv[0, :, 6:], kv[1, :, 71:] = torch.nan, torch.nan
    assert torch.equal(own().attend(q, kv[:, :1], kv[:, 1:], visible), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    x, weight = normal(40, 576, dtype=dtype), normal(96, 576, dtype=dtype)
    packed, norm = pack(weight), normal(576, dtype=dtype)
    alone = torch.cat([own().linear(row[None], packed, 96) for row in x])
    for batch in (2, 3, 7, 12, 13, 40):
        assert torch.equal(own().linear(x[:batch], packed, 96), alone[:batch])
        assert torch.equal(
            own().rms_norm(x[:batch], norm, 1e-5),
            torch.cat([own().rms_norm(row[None], norm, 1e-5) for row in x[:batch]]),
        )
    q, kv = normal(6, 1, 9, 64, dtype=dtype), normal(6, 6, 130, 64, dtype=dtype)
    whole = own().attend(q, kv[:, :3], kv[:, 3:], Visible())
    one = [own().attend(q[b : b + 1], kv[b : b + 1, :3], kv[b : b + 1, 3:], Visible()) for b in range(6)]
    assert torch.equal(whole, torch.cat(one))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_verified_token_has_the_bits_of_one_decoded_alone(dtype: torch.dtype) -> None:
    q, kv = normal(1, 5, 6, 32, dtype=dtype), normal(1, 4, 80, 32, dtype=dtype)
    seen = torch.arange(80) <= torch.arange(75, 80)[:, None]
    mask = fold_mask(torch.where(seen, 0.0, -torch.inf).to(dtype)[None, None], 3)
    for visible in (Visible(mask=mask), Visible(last_BT=torch.arange(75, 80)[None])):
        together = own().attend(q, kv[:, :2], kv[:, 2:], visible)
        for t in range(5):
            alone = own().attend(q[:, t : t + 1], kv[:, :2, : 76 + t], kv[:, 2:, : 76 + t], Visible())
            assert torch.equal(together[:, t : t + 1], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16, 24, 64])
def test_queries_and_keys_turn_and_values_stay(dtype: torch.dtype, size: int) -> None:
    qkv, angles = normal(2, 3, 8, size, dtype=dtype), torch.randn(20, size // 2).repeat(1, 2)
    tables = angles.cos().to(dtype), signed(angles.sin()).to(dtype)
    positions = torch.randint(0, 20, (2, 3))
    rotation = Rotation(tables, positions, 6, 2)
    expected = rotate(qkv.double(), *(table.double() for table in rotation.wide))
    for t, step in enumerate(rotation.steps()):
        assert_close_to(step(qkv[:, t : t + 1].clone()), expected[:, t : t + 1])
    assert_close_to(rotation(qkv), expected)


@pytest.mark.parametrize("tokens", [1, 3])
def test_keys_and_values_go_to_their_entries(tokens: int) -> None:
    layer, entries = torch.zeros(60, 8), torch.randperm(60)[: 2 * tokens * 4].view(2, tokens, 4)
    qkv = torch.randn(2, tokens, 7, 8)
    for kv in (qkv[:, :, 3:], qkv[:, :, 3:].transpose(1, 2).contiguous().transpose(1, 2)):
        expected = layer.clone().index_copy_(0, entries.view(-1), kv.reshape(-1, 8))
        own().keep(kv, entries, layer)
        assert torch.equal(layer, expected)
        layer.zero_()


def test_a_head_size_without_a_kernel_is_attended_by_torch() -> None:
    q, kv = torch.randn(1, 1, 2, 24), torch.randn(1, 2, 5, 24)
    assert 24 not in HEAD_SIZES
    torch.testing.assert_close(
        attend_cached(q, kv[:, :1], kv[:, 1:], Visible()), attend(q, kv[:, :1], kv[:, 1:], None)
    )


def test_without_a_compiler_one_warning_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.warns(UserWarning, match=r"CXX; FARM_KERNELS=off"):
        assert available.__wrapped__() is None
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such processor >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.warns(UserWarning, match="no such processor"):
        assert available.__wrapped__() is None
    monkeypatch.setenv("FARM_KERNELS", "off")
    assert available.__wrapped__() is None


def test_a_machine_compiles_once_and_another_source_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "cpu" / "kernels.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(build, "SOURCE", source.parent)
    first = build.compiled()
    changed = first.stat().st_mtime_ns
    assert build.compiled() == first
    assert first.stat().st_mtime_ns == changed
    source.write_text('extern "C" int two() { return 2; }')
    assert build.compiled() != first
    assert first.parent.stat().st_mode & 0o077 == 0, "others could replace the code"
    assert sorted(path.suffix for path in first.parent.iterdir()) == [".so", ".so"]


@pytest.mark.parametrize("home", ["a file", "open to others", "unknown"])
def test_a_home_that_cannot_be_written_or_trusted_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, home: str
) -> None:
    source = tmp_path / "cpu" / "kernels.cpp"
    source.parent.mkdir()
    source.write_text('extern "C" int one() { return 1; }')
    monkeypatch.setattr(build, "SOURCE", source.parent)
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    if home == "a file":
        folder.write_text("")
    elif home == "open to others":
        (folder / "farm").mkdir(parents=True)
        (folder / "farm").chmod(0o777)
    else:

        def nobody() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", nobody)
    built = build.compiled()
    assert built.exists()
    assert not built.is_relative_to(folder)
