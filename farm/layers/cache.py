# N slots, B rows in this call, T tokens, M = B T, S positions read, E entries of a tree, G key/value heads, P = 2 G
# D head size
"""Keys and values of a fixed number of sequences, addressed by slot and position.

A row is rolled back by writing again at a smaller position: entries at or beyond a row's length are never read,
because attention masks by position. Memory is taken once, when the cache is made.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from farm.layers.attention import causal_mask, tree_mask
from farm.layers.kernels import kernels_for

MOST_REAL = 0.9  # share of real tokens up to which leaving the others out pays


@dataclass(frozen=True)
class Branches:
    """Tokens of a call that stand in trees instead of one behind the other.

    From a row's start on the cache holds E nodes, of which the call's T tokens are the last. A token's entry lies at
    start + the index of its node, its position is start + depth, and it sees all before start and, from there, the
    nodes that `seen_BTE` names: its ancestors and itself.
    """

    depths_BT: Tensor  # int64
    seen_BTE: Tensor  # boolean

    def ahead(self, num_tokens: int) -> int:
        """Nodes that the cache holds before the call's."""
        return self.seen_BTE.shape[2] - num_tokens

    def of_rows(self, rows: slice) -> Branches:
        return Branches(self.depths_BT[rows], self.seen_BTE[rows])


@dataclass(frozen=True)
class Rows:
    """Which slots one forward call works on, and where each of its rows starts.

    Row b is slot `first + b`, so that a cache is read through views; `starts[b]` is the position of its first token.
    Rows may be ragged: tokens of a row beyond its real length are padding, whose entries a later write replaces
    before anything reads them. Where `counts` tells how many are real, products may leave the others out.
    """

    starts: Sequence[int]
    first: int = 0
    branches: Branches | None = None
    counts: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def end(self, num_tokens: int) -> int:
        """The number of entries that attention has to read."""
        ahead = 0 if self.branches is None else self.branches.ahead(num_tokens)
        return max(self.starts) + ahead + num_tokens

    def entries(self, num_tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Where in its slot the entry of each of `num_tokens` tokens lies, [B, T] int64; trees have other positions."""
        starts_B = torch.tensor(self.starts, dtype=torch.int64, device=device)
        return starts_B[:, None] + torch.arange(num_tokens, device=device)

    def mask(self, positions_BT: Tensor, context: int, group: int, dtype: torch.dtype) -> Tensor | None:
        """What the tokens see of `context` entries, for `attend` with `group` query heads a key/value head."""
        if self.branches is None:
            return causal_mask(positions_BT, context, group, dtype)
        starts_B = torch.tensor(self.starts, device=positions_BT.device)
        return tree_mask(starts_B, self.branches.seen_BTE, context, group, dtype)

    def real(self, num_tokens: int, device: torch.device | str = "cpu") -> Tensor | None:
        """Indices [M] of the real ones among B x T tokens; None where leaving the others out would not pay."""
        if self.counts is None or sum(self.counts) > MOST_REAL * num_tokens * len(self.counts):
            return None
        counts_B1 = torch.tensor(self.counts, device=device)[:, None]
        return (torch.arange(num_tokens, device=device) < counts_B1).view(-1).nonzero()[:, 0]


@dataclass(frozen=True)
class StaticRows:
    """As `Rows`, with starts that only the device knows: the same operators and shapes whatever they are.

    Attention reads `context` entries of every slot; no token that counts may stand at or beyond that.
    """

    starts_B: Tensor  # int64
    context: int
    first: int = 0
    branches: Branches | None = None

    def __len__(self) -> int:
        return self.starts_B.shape[0]

    def end(self, num_tokens: int) -> int:  # noqa: ARG002
        """The number of entries that attention reads."""
        return self.context

    def entries(self, num_tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """As those of `Rows`."""
        return self.starts_B[:, None] + torch.arange(num_tokens, device=device)

    def mask(self, positions_BT: Tensor, context: int, group: int, dtype: torch.dtype) -> Tensor:
        """As that of `Rows`, and never None: a chain is the tree in which a token sees all before it."""
        b, t = positions_BT.shape
        in_line_TT = torch.ones(t, t, dtype=torch.bool, device=positions_BT.device).tril()
        seen_BTE = in_line_TT.expand(b, t, t) if self.branches is None else self.branches.seen_BTE
        return tree_mask(self.starts_B, seen_BTE, context, group, dtype)

    def real(self, num_tokens: int, device: torch.device | str = "cpu") -> None:
        """All tokens take part in products."""


AnyRows = Rows | StaticRows


@dataclass(frozen=True)
class Window:
    """What one forward call reads and writes of a cache, worked out once for all layers."""

    positions_BT: Tensor  # of the call's tokens, int64
    context: int  # S: the number of entries that attention has to read
    rows: AnyRows
    entries_BTP: Tensor  # where the tokens' keys and values lie, in a layer seen as [N * P * capacity, D]
    entries_M: Tensor  # the same, flat
    flat: tuple[Tensor, ...]  # a layer each
    keys: tuple[Tensor, ...]  # [B, G, S, D] a layer
    values: tuple[Tensor, ...]

    def mask(self, group: int, dtype: torch.dtype) -> Tensor | None:
        """What the tokens see, for `attend` with `group` query heads a key/value head."""
        return self.rows.mask(self.positions_BT, self.context, group, dtype)

    def write(self, layer: int, kv_BTPD: Tensor, entries_BTP: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keeps the tokens' keys and values; returns all that they may read, keys and values [B, G, S, D].

        `entries_BTP` are some of the window's, where a call is for some of its tokens.
        """
        own = kernels_for(kv_BTPD)
        if own is not None:
            own.keep(kv_BTPD, self.entries_BTP if entries_BTP is None else entries_BTP, self.flat[layer])
        else:
            entries_M = self.entries_M if entries_BTP is None else entries_BTP.view(-1)
            self.flat[layer].index_copy_(0, entries_M, kv_BTPD.reshape(-1, kv_BTPD.shape[-1]))
        return self.keys[layer], self.values[layer]


class Cached(Protocol):
    """What of a forward decides the shape of its cache."""

    layers: Sized
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


class SlotCache:
    """One buffer [layers, N, 2 G, capacity, D], keys before values; `capacity` is in positions.

    Positions of one head lie behind each other: attention reads them as one run of memory.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        capacity: int,
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_kv_heads, head_dim = shape
        size = (num_layers, num_slots, 2 * self.num_kv_heads, capacity, head_dim)
        self.capacity = capacity
        self.buffer = torch.zeros(size, dtype=dtype, device=device)
        self._flat = self.buffer.view(num_layers, -1, head_dim).unbind(0)
        heads_NP = torch.arange(num_slots * 2 * self.num_kv_heads, device=device).view(num_slots, -1)
        self._starts_NP = heads_NP * capacity  # of each slot's heads in a flat layer

    @classmethod
    def of(cls, forward: Cached, num_slots: int, capacity: int) -> SlotCache:
        """A cache for `num_slots` sequences of a forward, each of at most `capacity` positions."""
        shape = (forward.num_kv_heads, forward.head_dim)
        return cls(len(forward.layers), num_slots, capacity, shape, forward.dtype, forward.device)

    @property
    def num_bytes(self) -> int:
        return self.buffer.nbytes

    def window(self, rows: AnyRows, num_tokens: int) -> Window:
        """The part of the cache that a call with `num_tokens` tokens a row works on."""
        end, num_rows = rows.end(num_tokens), len(rows)
        assert end <= self.capacity, f"position {end} exceeds the cache of {self.capacity}"
        entries_BT = positions_BT = rows.entries(num_tokens, self.buffer.device)
        if rows.branches is not None:
            positions_BT = entries_BT[:, :1] + rows.branches.depths_BT
            entries_BT = entries_BT + rows.branches.ahead(num_tokens)
        slots = slice(rows.first, rows.first + num_rows)
        entries_BTP = entries_BT[..., None] + self._starts_NP[slots, None]
        readable = self.buffer[:, slots, :, :end]
        return Window(
            positions_BT=positions_BT,
            context=end,
            rows=rows,
            entries_BTP=entries_BTP,
            entries_M=entries_BTP.view(-1),
            flat=self._flat,
            keys=readable[:, :, : self.num_kv_heads].unbind(0),
            values=readable[:, :, self.num_kv_heads :].unbind(0),
        )

    def keep(self, rows: Rows, nodes_BT: Tensor) -> None:
        """Puts the accepted paths of trees in line: the entry at a row's start + t becomes that of node nodes_BT[b, t].

        `nodes_BT` are indices from the rows' starts, ascending along a path, as a path's are.
        """
        starts_B1P = self._starts_NP[rows.first : rows.first + len(rows.starts), None]
        line_BT = rows.entries(nodes_BT.shape[1], nodes_BT.device)
        source_M = ((line_BT[:, :1] + nodes_BT)[..., None] + starts_B1P).view(-1)
        destination_M = (line_BT[..., None] + starts_B1P).view(-1)
        for layer in self._flat:
            layer.index_copy_(0, destination_M, layer.index_select(0, source_M))

    def move(self, sources: list[int], destinations: list[int], length: int) -> None:
        """Copies the first `length` positions of slots over others, all at once, so that slots may change places."""
        self.buffer[:, destinations, :, :length] = self.buffer[:, sources, :, :length]
