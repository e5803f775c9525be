# M = B T rows, H hidden, F mlp width, N query heads, G key/value heads, D head size
"""All layers of a decoder in one call of the kernels: what Python and torch cost between operators falls away.

A target's layers take this way and a draft's one layer, with what rows have of their own (farm/layers/by_row.py); the
same arithmetic, operator by operator, is in farm/target/forward.py and farm/draft/lean.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from farm.layers.attention import Rotation
from farm.layers.by_row import ByRow, Mlp, Tables
from farm.layers.cache import Site
from farm.layers.dense import Dense, Gated, RmsNorm
from farm.layers.kernels import HEAD_SIZES, address, check_tables, fields, kernels

MLPS = 2  # of a layer, at most
ALIKE = ByRow()  # rows have nothing of their own


class _Layer(ctypes.Structure):
    _fields_ = [
        *fields("input_norm qkv qkv_bias q_norm k_norm out out_bias post_norm", ""),
        ("mlps", Mlp * MLPS),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [*fields("layers fc", "num_layers hidden heads kv_heads size"), ("eps", ctypes.c_double)]


class Call(ctypes.Structure):
    """Mirrors the struct of the same name in cpu/decoder.h."""

    _fields_ = [
        *fields("x embedded hidden cos sin mask positions offsets cache scratch loras own", ""),
        *fields("", "sequences tokens context"),
        *fields("", "cache_layer kv_sequence kv_head mask_sequence mask_row"),
    ]


class Foretelling(ctypes.Structure):
    """Mirrors the struct of the same name in cpu/decoder.h."""

    _fields_ = fields("tokens last vocabulary norm head hidden logits best peak", "columns")


class TokenEnds(NamedTuple):
    """What stands before and behind the layers: a target's own, or those that a draft is run with."""

    embedding_VH: Tensor
    head: Dense  # [C, H]
    vocabulary_C: Tensor | None = None  # token id of each column; None: all
    norm: RmsNorm | None = None


class Foretold(NamedTuple):
    """Behind each of M tokens: the hidden state, the logits and the token id of the largest of them."""

    hidden_MH: Tensor
    logits_MC: Tensor
    best_M: Tensor


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
        self._scratch = 3 * hidden + (n + 2 * g) * d + n * d + widest
        self._apart = 2 * widest  # of scratch too where rows have LoRAs
        self.tables = Tables(len(layers))

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

    def scratch(self, by_row: ByRow) -> int:
        """Numbers that lie between operators, for each token of a call."""
        return self._scratch + (self._apart if by_row.loras is not None else 0) + by_row.widest

    def extend(self, x_MH: Tensor, rotation: Rotation, site: Site, by_row: ByRow = ALIKE) -> Tensor:
        """x [M, H] behind all layers, written over; keys and values go to the site."""
        assert x_MH.is_contiguous()
        assert x_MH.shape == (site.window.positions_BT.numel(), self.struct.hidden)
        self._run(x_MH, (None, None), rotation, site, by_row)
        return x_MH

    def predict(
        self,
        embedded_BTH: Tensor,
        hidden_BTH: Tensor,
        rotation: Rotation,
        site: Site,
        by_row: ByRow = ALIKE,
    ) -> Tensor:
        """A draft's hidden states [B, T, H] from embeddings beside hidden states."""
        embedded_BTH, hidden_BTH = embedded_BTH.contiguous(), hidden_BTH.contiguous()
        assert embedded_BTH.shape == hidden_BTH.shape == (*site.window.positions_BT.shape, self.struct.hidden)
        assert embedded_BTH.dtype == hidden_BTH.dtype
        x_BTH = torch.empty_like(embedded_BTH)
        self._run(x_BTH, (embedded_BTH, hidden_BTH), rotation, site, by_row)
        return x_BTH

    def can_foretell(self, ends: TokenEnds) -> bool:
        """Whether the kernels know these ends."""
        return ends.head.layout == "kernels" and ends.head.bias is None and ends.embedding_VH.is_contiguous()

    def foretell(
        self,
        tokens_BT: Tensor,
        ends: TokenEnds,
        rotation: Rotation,
        site: Site,
        by_row: ByRow = ALIKE,
    ) -> Foretold:
        """From token ids to the logits behind every token."""
        tokens_BT, num, new = tokens_BT.contiguous(), tokens_BT.numel(), ends.embedding_VH.new_empty
        assert tokens_BT.shape == site.window.positions_BT.shape
        out = Foretold(
            new(num, self.struct.hidden), new(num, ends.head.num_outputs), tokens_BT.new_empty(num)
        )
        x_MH, scratch = new(num, self.struct.hidden), new(num * self.scratch(by_row))
        call = self._call(x_MH, (ends.embedding_VH, None), rotation, site, scratch)
        self.tables.attach(call, by_row, len(tokens_BT), x_MH.dtype)
        norm_H = None if ends.norm is None else ends.norm.weight_H
        told = Foretelling(
            tokens_BT.data_ptr(), None, address(ends.vocabulary_C), address(norm_H),
            *(part.data_ptr() for part in (ends.head.weight, *out)), None, ends.head.num_outputs,
        )  # fmt: skip
        kernels().run("foretell", x_MH.dtype, self.struct, call, told)
        return out

    def _run(
        self,
        x: Tensor,
        pair: tuple[Tensor | None, Tensor | None],
        rotation: Rotation,
        site: Site,
        by_row: ByRow,
    ) -> None:
        scratch = x.new_empty(x.numel() // self.struct.hidden * self.scratch(by_row))
        call = self._call(x, pair, rotation, site, scratch)
        self.tables.attach(call, by_row, len(site.window.positions_BT), x.dtype)
        kernels().run("decode", x.dtype, self.struct, call)

    def _call(
        self,
        x: Tensor,
        pair: tuple[Tensor | None, Tensor | None],
        rotation: Rotation,
        site: Site,
        scratch: Tensor,
    ) -> Call:
        window, cache = site.window, site.window.cache.buffer
        (b, t), context, tables = window.positions_BT.shape, window.context, rotation.tables
        check_tables(tables, self.struct.size, x.dtype)
        # Entries of a tree lie further out than its positions.
        assert context <= len(tables[0]) or rotation.is_in_reach
        assert cache.dtype == x.dtype
        assert window.positions_BT.is_contiguous()
        assert window.offsets_BT.is_contiguous()
        site.visible.check((b, t, context), x.dtype)
        layer, sequence, head = cache.stride()[:3]
        return Call(
            x.data_ptr(), *map(address, pair), *map(address, tables), address(site.visible.mask),
            window.positions_BT.data_ptr(), window.offsets_BT.data_ptr(),
            cache.data_ptr() + window.rows.first * sequence * cache.itemsize, scratch.data_ptr(), None, None,
            b, t, context, layer, sequence, head, *site.visible.strides(),
        )  # fmt: skip


def _layer(weights: Weights) -> _Layer:
    def norm(one: RmsNorm | None) -> int | None:
        return None if one is None else one.weight_H.data_ptr()

    mlps = [Mlp.of(gated, down) for gated, down in weights.mlps]
    return _Layer(
        norm(weights.input_norm), weights.qkv.weight.data_ptr(), address(weights.qkv.bias),
        norm(weights.q_norm), norm(weights.k_norm), weights.out.weight.data_ptr(), address(weights.out.bias),
        norm(weights.post_norm), (Mlp * MLPS)(*mlps),
    )  # fmt: skip
