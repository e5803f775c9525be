# B rows, T tokens, S entries read, E entries of a tree, N query heads, G key/value heads, R = N / G, D head size
"""Rotary positions and grouped-query attention over a slot cache."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from farm.layers.kernels import HEAD_SIZES, Visible, kernels_for


def rotary_tables(inv_freq: Tensor, num_positions: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [num_positions, D] of the rotate-half form of RoPE (RoFormer, eq. 34), fp32."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=inv_freq.device)
    angles = torch.outer(positions, inv_freq.float())
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling


def plain_frequencies(head_dim: int, theta: float) -> Tensor:
    """RoPE's inverse frequencies [D / 2] without scaling."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotate(x_BTND: Tensor, cos_BT1D: Tensor, sin_BT1D: Tensor) -> Tensor:
    """x rotated by its position; `sin` is negated in its first half (see `signed`), which saves a negation here."""
    halves_swapped = x_BTND.roll(x_BTND.shape[-1] // 2, -1)
    return torch.addcmul(x_BTND * cos_BT1D, halves_swapped, sin_BT1D)


def spare_values(table_BT1D: Tensor, num_rotated: int, num_values: int, fill: float) -> Tensor:
    """cos or sin for rotated heads followed by heads that stay as they are, [B, T, rotated + values, D].

    `fill` is 1 for cos, 0 for sin. Keys and values leave one product side by side and so can be written at once.
    """
    b, t, _, d = table_BT1D.shape
    as_is_BTND = torch.full((), fill, dtype=table_BT1D.dtype, device=table_BT1D.device)
    rotated_BTND = table_BT1D.expand(b, t, num_rotated, d)
    return torch.cat((rotated_BTND, as_is_BTND.expand(b, t, num_values, d)), dim=2)


@dataclass(frozen=True)
class Rotation:
    """What turns a call's queries and keys by their positions, in heads where values come last; for all layers."""

    tables: tuple[Tensor, Tensor]  # cos and sin [S, D], sin as `signed` makes it
    positions_BT: Tensor
    num_rotated: int
    num_values: int

    @functools.cached_property
    def wide(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every head of every token, [B, T, N + 2 G, D]."""
        cos_BT1D, sin_BT1D = (table[self.positions_BT].unsqueeze(2) for table in self.tables)
        cos_BTND = spare_values(cos_BT1D, self.num_rotated, self.num_values, 1.0)
        return cos_BTND, spare_values(sin_BT1D, self.num_rotated, self.num_values, 0.0)

    @functools.cached_property
    def is_in_reach(self) -> bool:
        """Whether the tables have all of the positions."""
        return int(self.positions_BT.max()) < len(self.tables[0])

    def steps(self) -> list[Rotation]:
        """That of each of the T tokens a row alone."""
        of_steps = self.positions_BT.t().contiguous()
        return [replace(self, positions_BT=positions_B[:, None]) for positions_B in of_steps]

    def __call__(self, qkv_BTND: Tensor) -> Tensor:
        """The turned heads and the values as they are; may write over what it is given."""
        own = kernels_for(qkv_BTND)
        if own is None:
            return rotate(qkv_BTND, *self.wide)
        assert self.is_in_reach
        own.rotate_(qkv_BTND, self.tables, self.positions_BT, self.num_rotated)
        return qkv_BTND


def signed(sin_SD: Tensor) -> Tensor:
    """sin with its first half negated, as `rotate` takes it."""
    first, second = sin_SD.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def causal_mask(positions_BT: Tensor, context: int, group: int, dtype: torch.dtype) -> Tensor | None:
    """Mask [B, 1, R * T, S] for `attend`: a query sees the positions up to its own; R = `group`, 1 for one token.

    Made of 0 and -inf, since a boolean one would be turned into that again in every layer. None where everything is
    visible: one row, one token.
    """
    if positions_BT.shape == (1, 1):
        return None
    hidden_BTS = torch.arange(context, device=positions_BT.device) > positions_BT[..., None]
    return _additive(hidden_BTS, group, dtype)


def tree_mask(starts_B: Tensor, seen_BTE: Tensor, context: int, group: int, dtype: torch.dtype) -> Tensor:
    """As `causal_mask`: a query sees all before its row's start, and of the E entries from there on those of `seen`."""
    index_BS = torch.arange(context, device=seen_BTE.device) - starts_B[:, None]
    num_entries = seen_BTE.shape[2]
    nearest_BTS = index_BS.clamp(0, num_entries - 1)[:, None].expand(-1, seen_BTE.shape[1], -1)
    seen_BTS = seen_BTE.gather(2, nearest_BTS) & (index_BS < num_entries)[:, None]
    return _additive(~(seen_BTS | (index_BS < 0)[:, None]), group, dtype)


def _additive(hidden_BTS: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    return fold_mask(torch.where(hidden_BTS, -torch.inf, 0.0).to(dtype)[:, None], group)


def fold_mask(mask_B1TS: Tensor, group: int) -> Tensor:
    """The mask repeated for the R query heads of a key/value head, [B, 1, R * T, S]; of one token [B, 1, 1, S]."""
    return mask_B1TS if group == 1 or mask_B1TS.shape[2] == 1 else mask_B1TS.repeat(1, 1, group, 1)


def has_kernel(cache: Tensor) -> bool:
    """Whether the farm's own kernels attend over a cache [..., D] like this one."""
    return kernels_for(cache) is not None and cache.shape[-1] in HEAD_SIZES


def attend_cached(q_BTND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible: Visible) -> Tensor:
    """As `attend`, without gradients: by the farm's own kernel where there is one (see `has_kernel`)."""
    own = kernels_for(q_BTND) if has_kernel(q_BTND) else None
    if own is not None:
        return own.attend(q_BTND, k_BGSD, v_BGSD, visible)
    return attend(q_BTND, k_BGSD, v_BGSD, visible.mask)


def attend(q_BTND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, [B, T, N * D]; `mask` is [B, 1, R * T, S], boolean or additive (see `fold_mask`).

    Heads of one group are folded into rows, so that each key/value head is read once and a batch stays one product.
    """
    b, t, n, d = q_BTND.shape
    g = k_BGSD.shape[1]
    r = n // g
    if t == 1:  # heads stand by group already
        q_BGRD = q_BTND.view(b, g, r, d)
        out_BGRD = functional.scaled_dot_product_attention(q_BGRD, k_BGSD, v_BGSD, attn_mask=mask)
        return out_BGRD.reshape(b, 1, n * d)
    q_BGRTD = q_BTND.view(b, t, g, r, d).permute(0, 2, 3, 1, 4)
    out_BGND = functional.scaled_dot_product_attention(
        q_BGRTD.reshape(b, g, r * t, d), k_BGSD, v_BGSD, attn_mask=mask
    )
    return out_BGND.view(b, g, r, t, d).permute(0, 3, 1, 2, 4).reshape(b, t, n * d)
