# N slots, B rows in this call, T tokens, S positions read, G key/value heads, P = 2 G, D head size
"""Keys and values of a fixed number of sequences, addressed by slot and position.

A row is rolled back by writing again at a smaller position: entries at or beyond a row's length are never read,
because attention masks by position. Memory is taken once, when the cache is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which slots one forward call works on, and where each of its rows starts.

    Row b is slot `first + b`, so that a cache is read through views; `starts[b]` is the position of its first token.
    Rows may be ragged: tokens of a row beyond its real length are padding, whose entries a later write replaces
    before anything reads them.
    """

    starts: Sequence[int]
    first: int = 0

    def positions(self, num_tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """Absolute positions [B, T] of `num_tokens` tokens a row, int64."""
        starts_B = torch.tensor(self.starts, dtype=torch.int64, device=device)
        return starts_B[:, None] + torch.arange(num_tokens, device=device)

    def context(self, num_tokens: int) -> int:
        """S: the number of positions that attention has to read."""
        return max(self.starts) + num_tokens


class SlotCache:
    """A buffer [N, capacity, 2 G, D] a layer, keys before values; `capacity` is in positions."""

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
        size = (num_slots, capacity, 2 * self.num_kv_heads, head_dim)
        self.capacity = capacity
        self.layers = [torch.zeros(size, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.layers)

    def update(self, layer: int, rows: Rows, kv_BTPD: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the rows' new keys and values, and returns views of what they may read, [B, S, G, D] each."""
        num_rows, num_tokens = kv_BTPD.shape[:2]
        end = rows.context(num_tokens)
        assert end <= self.capacity, f"position {end} exceeds the cache of {self.capacity}"
        buffer = self.layers[layer][rows.first : rows.first + num_rows]
        if num_rows == 1 or len(set(rows.starts)) == 1:
            buffer[:, end - num_tokens : end] = kv_BTPD
        else:
            rows_B1 = torch.arange(num_rows, device=buffer.device)[:, None]
            buffer[rows_B1, rows.positions(num_tokens, buffer.device)] = kv_BTPD
        return buffer[:, :end, : self.num_kv_heads], buffer[:, :end, self.num_kv_heads :]

    def move(self, source: int, destination: int, length: int) -> None:
        """Copies the first `length` positions of one slot over another, so that live slots stay 0..B-1."""
        for buffer in self.layers:
            buffer[destination, :length] = buffer[source, :length]
