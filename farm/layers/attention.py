# B rows, T tokens, S positions read, N query heads, G key/value heads, R = N / G, D head size
"""Rotary positions and grouped-query attention over a slot cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rotary_tables(inv_freq: Tensor, num_positions: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin [num_positions, D] of the rotate-half form of RoPE (RoFormer, eq. 34), fp32."""
    positions = torch.arange(num_positions, dtype=torch.float32, device=inv_freq.device)
    angles = torch.outer(positions, inv_freq.float())
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scaling, angles.sin() * scaling


def plain_frequencies(head_dim: int, theta: float) -> Tensor:
    """RoPE's inverse frequencies [D / 2] without scaling."""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotate(x_BTND: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """x rotated by its position; cos and sin are [B, T, D] or broadcast to it."""
    first, second = x_BTND.chunk(2, dim=-1)
    turned_BTND = torch.cat((-second, first), dim=-1)
    return x_BTND * cos_BTD.unsqueeze(-2) + turned_BTND * sin_BTD.unsqueeze(-2)


def causal_mask(positions_BT: Tensor, context: int) -> Tensor | None:
    """Boolean mask [B, 1, T, S]: a query sees the positions up to its own. None where everything is visible."""
    if positions_BT.shape == (1, 1):
        return None
    return (torch.arange(context, device=positions_BT.device) <= positions_BT[..., None])[:, None]


def attend(q_BTND: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask_B1TS: Tensor | None) -> Tensor:
    """Softmax attention, [B, T, N * D].

    Heads of one group are folded into rows, so that each key/value head is read once and a batch stays one product.
    """
    b, t, n, d = q_BTND.shape
    g = k_BSGD.shape[2]
    r = n // g
    q_BGRTD = q_BTND.view(b, t, g, r, d).permute(0, 2, 3, 1, 4)
    if mask_B1TS is not None and r > 1:
        mask_B1TS = mask_B1TS.repeat(1, 1, r, 1)
    out_BGND = functional.scaled_dot_product_attention(
        q_BGRTD.reshape(b, g, r * t, d), k_BSGD.transpose(1, 2), v_BSGD.transpose(1, 2), attn_mask=mask_B1TS
    )
    return out_BGND.view(b, g, r, t, d).permute(0, 3, 1, 2, 4).reshape(b, t, n * d)
