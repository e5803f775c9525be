# M = B T rows, H hidden, F mlp width, N query heads, G key/value heads, D head size
"""All layers of a decoder in one call of the kernels: what Python and torch cost between operators falls away.

A target's layers and a draft's one layer take this way whenever nothing changes them by row; the same arithmetic,
operator by operator, is in farm/target/forward.py and farm/draft/lean.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from farm.layers.attention import Rotation
from farm.layers.cache import Rows, Site, SlotCache
from farm.layers.dense import Dense, Gated, RmsNorm
from farm.layers.kernels import HEAD_SIZES, address, check_tables, fields, kernels

MLPS = 2  # of a layer, at most


class _Mlp(ctypes.Structure):
    _fields_ = fields("gate_up down", "width")


class _Layer(ctypes.Structure):
    _fields_ = [
        *fields("input_norm qkv qkv_bias q_norm k_norm out out_bias post_norm", ""),
        ("mlps", _Mlp * MLPS),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [*fields("layers fc", "num_layers hidden heads kv_heads size"), ("eps", ctypes.c_double)]


class _Call(ctypes.Structure):
    _fields_ = [
        *fields("x embedded hidden cos sin mask positions offsets cache scratch", "sequences tokens context"),
        *fields("", "cache_layer kv_sequence kv_head mask_sequence mask_row"),
    ]


class _Foretelling(ctypes.Structure):
    _fields_ = fields("tokens last vocabulary head hidden logits best peak", "columns")


class DraftEnds(NamedTuple):
    """The embedding and head that a draft is run with."""

    embedding_VH: Tensor
    head: Dense  # [C, H]
    vocabulary_C: Tensor | None  # token id of each column; None: all


class Weights(NamedTuple):
    """Of one layer."""

    input_norm: RmsNorm | None
    qkv: Dense  # [(N + 2 G) * D, H]
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    out: Dense  # [H, N * D]
    post_norm: RmsNorm
    mlps: Sequence[
        tuple[Gated, Dense]
    ]  # two of [F, H], and [H, F]; all over the same input, their sums added

    @property
    def dense(self) -> list[Dense]:
        return [self.qkv, self.out, *(part for gated, down in self.mlps for part in (gated.gate_up, down))]

    @property
    def norms(self) -> list[RmsNorm]:
        every = (self.input_norm, self.q_norm, self.k_norm, self.post_norm)
        return [norm for norm in every if norm is not None]


class Decoder:
    """Layers of one shape over a slot cache."""

    def __init__(
        self, layers: Sequence[Weights], heads: tuple[int, int, int], fc: Dense | None = None
    ) -> None:
        """`heads` are N, G and D; `fc` [H, 2 H] stands in front of a draft; weights are laid out for kernels."""
        self._kept = layers, fc  # the structs hold addresses alone
        n, g, d = heads
        norm = layers[0].post_norm
        hidden = norm.weight_H.shape[0]
        self._layers = (_Layer * len(layers))(*map(_layer, layers))
        front = None if fc is None else fc.weight.data_ptr()
        self.struct = _Decoder(ctypes.addressof(self._layers), front, len(layers), hidden, n, g, d, norm.eps)
        widest = max(gated.gate_up.num_outputs // 2 for layer in layers for gated, _ in layer.mlps)
        self.scratch = 3 * hidden + (n + 2 * g) * d + n * d + widest

    @classmethod
    def of(
        cls, layers: Sequence[Weights], heads: tuple[int, int, int], fc: Dense | None = None
    ) -> Decoder | None:
        """None where the kernels cannot compute it."""
        weights = [dense for layer in layers for dense in layer.dense] + ([] if fc is None else [fc])
        norms = [norm for layer in layers for norm in layer.norms]
        numbers = [norm.weight_H for norm in norms] + [one.bias for one in weights if one.bias is not None]
        laid_out = all(dense.layout == "kernels" for dense in weights)
        alike = len({x.dtype for x in (*numbers, *(one.weight for one in weights))}) == 1
        alike &= len({norm.eps for norm in norms}) == 1
        known = laid_out and alike and heads[2] in HEAD_SIZES and all(x.is_contiguous() for x in numbers)
        return cls(layers, heads, fc) if known else None

    def extend(self, x_MH: Tensor, rotation: Rotation, site: Site) -> Tensor:
        """x [M, H] behind all layers, written over; keys and values go to the site."""
        assert x_MH.is_contiguous()
        assert x_MH.shape == (site.window.positions_BT.numel(), self.struct.hidden)
        self._run(x_MH, (None, None), rotation, site)
        return x_MH

    def predict(self, embedded_BTH: Tensor, hidden_BTH: Tensor, rotation: Rotation, site: Site) -> Tensor:
        """A draft's hidden states [B, T, H] from embeddings beside hidden states."""
        embedded_BTH, hidden_BTH = embedded_BTH.contiguous(), hidden_BTH.contiguous()
        assert embedded_BTH.shape == hidden_BTH.shape == (*site.window.positions_BT.shape, self.struct.hidden)
        assert embedded_BTH.dtype == hidden_BTH.dtype
        x_BTH = torch.empty_like(embedded_BTH)
        self._run(x_BTH, (embedded_BTH, hidden_BTH), rotation, site)
        return x_BTH

    def can_foretell(self, ends: DraftEnds) -> bool:
        """Whether a Foreteller knows these ends."""
        return ends.head.layout == "kernels" and ends.head.bias is None and ends.embedding_VH.is_contiguous()

    def _run(
        self,
        x: Tensor,
        pair: tuple[Tensor | None, Tensor | None],
        rotation: Rotation,
        site: Site,
    ) -> None:
        window, cache = site.window, site.window.cache.buffer
        (b, t), context, tables = window.positions_BT.shape, window.context, rotation.tables
        check_tables(tables, self.struct.size, x.dtype)
        assert context <= len(tables[0])
        assert cache.dtype == x.dtype
        assert window.positions_BT.is_contiguous()
        assert window.offsets_BT.is_contiguous()
        site.visible.check((b, t, context), x.dtype)
        layer, sequence, head = cache.stride()[:3]
        scratch = x.new_empty(b * t * self.scratch)
        call = _Call(
            x.data_ptr(), *map(address, pair), *map(address, tables), address(site.visible.mask),
            window.positions_BT.data_ptr(), window.offsets_BT.data_ptr(),
            cache.data_ptr() + window.rows.first * sequence * cache.itemsize, scratch.data_ptr(),
            b, t, context, layer, sequence, head, *site.visible.strides(),
        )  # fmt: skip
        kernels().run("decode", x.dtype, self.struct, call)


class Foreteller:
    """A draft at work on a batch: reads tokens from their ids to the logits behind them, a call of the kernels each.

    It first reads T tokens a row, of which `counts[b]` are real and the others padding, then one at a time, up to
    `num_steps` of them. Addresses are worked out once; outputs of each call stay in memory of their own.
    """

    def __init__(
        self,
        decoder: Decoder,
        ends: DraftEnds,
        tables: tuple[Tensor, Tensor],
        cache: SlotCache,
        num_steps: int,
    ) -> None:
        assert decoder.can_foretell(ends)
        check_tables(tables, decoder.struct.size, cache.buffer.dtype)
        assert cache.buffer.dtype == ends.embedding_VH.dtype == ends.head.weight.dtype
        self._decoder, self._ends, self._tables, self._cache = decoder, ends, tables, cache
        self._num_steps, self._done = num_steps, 0

    def begin(self, tokens_BT: Tensor, hidden_BTH: Tensor, rows: Rows, counts: Sequence[int]) -> None:
        """Reads the first tokens, row b's from `rows.starts[b]` on."""
        (b, t), k, hidden = tokens_BT.shape, self._num_steps, self._decoder.struct.hidden
        tokens_BT, hidden_BTH, cache = tokens_BT.contiguous(), hidden_BTH.contiguous(), self._cache
        end = max(start + max(t, count + k) for start, count in zip(rows.starts, counts, strict=True))
        assert end <= min(cache.capacity, len(self._tables[0]))
        assert rows.branches is None
        assert hidden_BTH.shape == (b, t, hidden)
        assert hidden_BTH.dtype == cache.buffer.dtype
        read = [start + i for start in rows.starts for i in range(t)]
        steps = [
            start + count + i for i in range(k) for start, count in zip(rows.starts, counts, strict=True)
        ]
        self._numbers = torch.tensor([*read, *steps, *(count - 1 for count in counts), *[0] * b])
        self._first, self._size, self._columns = b * t, b, self._ends.head.num_outputs
        new = hidden_BTH.new_empty
        self._hidden_KBH, self._logits_KBC = new(k + 1, b, hidden), new(k + 1, b, self._columns)
        self._best_KB, self._peak_KB = tokens_BT.new_empty(k + 1, b), new((k + 1, b), dtype=torch.float32)
        # x of the tokens, then what lies between operators.
        self._scratch = new(b * t * (hidden + self._decoder.scratch))
        layer, sequence, head = cache.buffer.stride()[:3]
        numbers, first_row = self._numbers.data_ptr(), rows.first * sequence * cache.buffer.itemsize
        self._call = _Call(
            self._scratch.data_ptr(), self._ends.embedding_VH.data_ptr(), hidden_BTH.data_ptr(),
            *map(address, self._tables), None, numbers, numbers, cache.buffer.data_ptr() + first_row,
            self._scratch.data_ptr() + b * t * hidden * cache.buffer.itemsize, b, t, end, layer, sequence, head, 0, 0,
        )  # fmt: skip
        self._foretelling = _Foretelling(
            tokens_BT.data_ptr(), numbers + 8 * (b * t + k * b), address(self._ends.vocabulary_C),
            self._ends.head.weight.data_ptr(), self._hidden_KBH.data_ptr(), self._logits_KBC.data_ptr(),
            self._best_KB.data_ptr(), self._peak_KB.data_ptr(), self._columns,
        )  # fmt: skip
        self._run()
        self._call.tokens, self._foretelling.last = 1, self._foretelling.last + 8 * b

    def step(self, tokens_B: Tensor) -> None:
        """Reads one token more a row."""
        assert tokens_B.is_contiguous()
        assert tokens_B.shape == (self._size,)
        assert self._done <= self._num_steps
        call, told, done = self._call, self._foretelling, self._done
        call.positions = call.offsets = self._numbers.data_ptr() + 8 * (self._first + (done - 1) * self._size)
        call.hidden, told.tokens = told.hidden, tokens_B.data_ptr()
        told.hidden += self._hidden_KBH[0].nbytes
        told.logits += self._logits_KBC[0].nbytes
        told.best += 8 * self._size
        told.peak += 4 * self._size
        self._run()

    def _run(self) -> None:
        self._done += 1
        kernels().run("foretell", self._scratch.dtype, self._decoder.struct, self._call, self._foretelling)

    @property
    def logits_BC(self) -> Tensor:  # noqa: N802 - a tensor's name carries its shape
        """Behind the token that each row has read last."""
        return self._logits_KBC[self._done - 1]

    @property
    def best_B(self) -> Tensor:  # noqa: N802
        """Token id of the largest logit."""
        return self._best_KB[self._done - 1]

    @property
    def peak_B(self) -> Tensor:  # noqa: N802
        """Its probability, fp32."""
        return self._peak_KB[self._done - 1]


def _layer(weights: Weights) -> _Layer:
    def norm(one: RmsNorm | None) -> int | None:
        return None if one is None else one.weight_H.data_ptr()

    mlps = [
        _Mlp(gated.gate_up.weight.data_ptr(), down.weight.data_ptr(), gated.gate_up.num_outputs // 2)
        for gated, down in weights.mlps
    ]
    return _Layer(
        norm(weights.input_norm), weights.qkv.weight.data_ptr(), address(weights.qkv.bias),
        norm(weights.q_norm), norm(weights.k_norm), weights.out.weight.data_ptr(), address(weights.out.bias),
        norm(weights.post_norm), (_Mlp * MLPS)(*mlps),
    )  # fmt: skip
