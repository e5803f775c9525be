# N slots, B rows in this call, T tokens, M = B T, S positions read, E entries of a tree, G key/value heads, P = 2 G
# D head size
"""Keys and values of a fixed number of sequences, addressed by slot and position.

A row is rolled back by writing again at a smaller position: entries at or beyond a row's length are never read,
because attention masks by position. Memory is taken once, when the cache is made.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from farm.layers.attention import causal_mask, has_kernel, tree_mask
from farm.layers.kernels import Visible, kernels_for

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

    cache: SlotCache
    rows: AnyRows
    positions_BT: Tensor  # of the call's tokens, int64
    offsets_BT: Tensor  # of their entries in their slots, int64; of a chain the same
    context: int  # S: the number of entries that attention has to read

    @functools.cached_property
    def entries_BTP(self) -> Tensor:  # noqa: N802 - a tensor's name carries its shape
        """Where the tokens' keys and values lie, in a layer seen as [N * P * capacity, D]."""
        return self.offsets_BT[..., None] + self.cache.starts(self.rows)

    @functools.cached_property
    def readable(self) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Keys and values [B, G, S, D] of each layer."""
        slots, heads = slice(self.rows.first, self.rows.first + len(self.rows)), self.cache.num_kv_heads
        of_rows = self.cache.buffer[:, slots, :, : self.context]
        return of_rows[:, :, :heads].unbind(0), of_rows[:, :, heads:].unbind(0)

    def mask(self, group: int, dtype: torch.dtype) -> Tensor | None:
        """What the tokens see, for `attend` with `group` query heads a key/value head."""
        return self.rows.mask(self.positions_BT, self.context, group, dtype)

    def site(self, group: int) -> Site:
        """With what the tokens see: in a chain all up to themselves, for which kernels need no mask."""
        if isinstance(self.rows, Rows) and self.rows.branches is None and has_kernel(self.cache.buffer):
            return Site(self, Visible(last_BT=self.offsets_BT))
        return Site(self, Visible(mask=self.mask(group, self.cache.buffer.dtype)))

    def write(self, layer: int, kv_BTPD: Tensor) -> tuple[Tensor, Tensor]:
        """Keeps the tokens' keys and values; returns all that may be read, keys and values [B, G, S, D]."""
        own = kernels_for(kv_BTPD)
        if own is not None:
            own.keep(kv_BTPD, self.entries_BTP, self.cache.flat[layer])
        else:
            kv_MD = kv_BTPD.reshape(-1, kv_BTPD.shape[-1])
            self.cache.flat[layer].index_copy_(0, self.entries_BTP.view(-1), kv_MD)
        keys, values = self.readable
        return keys[layer], values[layer]


@dataclass(frozen=True)
class Site:
    """Where the tokens of a call write their keys and values, and what they see."""

    window: Window
    visible: Visible

    def steps(self) -> list[Site]:
        """That of each of the T tokens a row alone, for calls one after the other."""
        window = self.window
        both = (x_BT.t().contiguous().unsqueeze(2) for x_BT in (window.positions_BT, window.offsets_BT))
        visible = self.visible.steps(window.positions_BT.shape[1])
        return [
            Site(replace(window, positions_BT=positions_B1, offsets_BT=offsets_B1), seen)
            for positions_B1, offsets_B1, seen in zip(*both, visible, strict=True)
        ]


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
        self.flat = self.buffer.view(num_layers, -1, head_dim).unbind(0)
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
        end = rows.end(num_tokens)
        assert end <= self.capacity, f"position {end} exceeds the cache of {self.capacity}"
        offsets_BT = positions_BT = rows.entries(num_tokens, self.buffer.device)
        if rows.branches is not None:
            positions_BT = offsets_BT[:, :1] + rows.branches.depths_BT
            offsets_BT = offsets_BT + rows.branches.ahead(num_tokens)
        return Window(self, rows, positions_BT, offsets_BT, end)

    def starts(self, rows: AnyRows) -> Tensor:
        """Where the rows' heads start in a flat layer, [B, 1, P]."""
        return self._starts_NP[rows.first : rows.first + len(rows), None]

    def keep(self, rows: Rows, nodes_BT: Tensor) -> None:
        """Puts the accepted paths of trees in line: the entry at a row's start + t becomes that of node nodes_BT[b, t].

        `nodes_BT` are indices from the rows' starts, ascending along a path, as a path's are.
        """
        starts_B1P = self.starts(rows)
        line_BT = rows.entries(nodes_BT.shape[1], nodes_BT.device)
        source_M = ((line_BT[:, :1] + nodes_BT)[..., None] + starts_B1P).view(-1)
        destination_M = (line_BT[..., None] + starts_B1P).view(-1)
        for layer in self.flat:
            layer.index_copy_(0, destination_M, layer.index_select(0, source_M))

    def move(self, sources: list[int], destinations: list[int], length: int) -> None:
        """Copies the first `length` positions of slots over others, all at once, so that slots may change places."""
        self.buffer[:, destinations, :, :length] = self.buffer[:, sources, :, :length]
