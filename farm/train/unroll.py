# B rows, T draft positions, M of their B T positions, H hidden
# G key/value heads, P = 2 G, D head size, S = (s + 1) T keys read at step s
"""A draft unrolled over its own predictions, in the form that serving has (HASS 2408.15766, EAGLE-3 2503.01840).

Tokens x_0 .. x_{L-1}, true hidden states h_0 .. h_{L-2}. Step s at index t continues a round that began at t:

    input       e(x_{t+1+s}), and h_t at s = 0 or the step before's own prediction at t after that
    position    t + s
    attends     keys of step 0 at i <= t (made from true h), and its own steps 1..s at t: never keys of other indices
                that were made from predictions, because a round overwrites those with true ones
    predicts    h_{t+1+s}, whose head gives the distribution of x_{t+2+s}
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farm.draft.model import Draft
from farm.draft.trunk import Trunk
from farm.layers.attention import fold_mask


def unroll(
    draft: Draft,
    embedded_BTH: Tensor,
    hidden_BTH: Tensor,
    num_steps: int,
    at: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Predicted hidden states of every step, `num_steps` tensors [B, T, H], or [M, H] of some positions.

    Args:
        embedded_BTH: e(x_{t+1}) at index t; step s reads it shifted by s, zeros at the end.
        hidden_BTH: h_t at index t.
        at: by step, which of the B * T positions are wanted, int64 [M] ascending; those of a step are among those of
            the step before. Keys and values are made everywhere, what follows attention only there. None: all.
    """
    num_rows, length, _ = embedded_BTH.shape
    index_T = torch.arange(length, device=embedded_BTH.device)
    remember = OwnSteps(num_rows, length, draft.config.num_heads // draft.config.num_kv_heads, index_T)
    predicted: list[Tensor] = []
    for step in range(num_steps):
        inputs_BTH = predicted[-1] if predicted else hidden_BTH
        if predicted and at is not None:
            inputs_BTH = _spread(predicted[-1], at[step - 1], hidden_BTH.shape)
        positions_BT = (index_T + step).expand(num_rows, length)
        at_M = None if at is None else at[step]
        predicted.append(draft(shift(embedded_BTH, step), inputs_BTH, positions_BT, remember, at_M))
    return predicted


def _spread(values_MH: Tensor, at_M: Tensor, shape: torch.Size) -> Tensor:
    """Values back in their places among B * T positions, zeros elsewhere; [B, T, H]."""
    return values_MH.new_zeros(shape).flatten(0, 1).index_copy(0, at_M, values_MH).view(shape)


class OwnSteps:
    """What a round that began at index t reads: keys of step 0 up to t, and those of its own later steps at t."""

    def __init__(self, num_rows: int, length: int, group: int, index_T: Tensor) -> None:
        self._num_rows, self._length, self._group = num_rows, length, group
        self._causal_TT = index_T <= index_T[:, None]
        self._own_TT = index_T == index_T[:, None]
        self._seen: list[Tensor] = []

    def __call__(self, kv_BTPD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [B, G, S, D] with the mask; see Trunk.forward."""
        self._seen.append(kv_BTPD)
        mask_TS = torch.cat((self._causal_TT, *[self._own_TT] * (len(self._seen) - 1)), dim=1)
        mask_B1TS = mask_TS.expand(self._num_rows, 1, self._length, mask_TS.shape[1])
        k_BGSD, v_BGSD = torch.cat(self._seen, dim=1).transpose(1, 2).chunk(2, dim=1)
        return k_BGSD, v_BGSD, fold_mask(mask_B1TS, self._group)


def frozen_part(trunk: Trunk, embedded_BTH: Tensor, hidden_BTH: Tensor) -> tuple[Tensor, Tensor]:
    """What the trunk puts out at step 0: the residual that an expert adds to, and its input, [B, T, H] each."""
    num_rows, length, _ = embedded_BTH.shape
    index_T = torch.arange(length, device=embedded_BTH.device)
    remember = OwnSteps(num_rows, length, trunk.config.num_heads // trunk.config.num_kv_heads, index_T)
    return trunk(embedded_BTH, hidden_BTH, index_T.expand(num_rows, length), remember)  # type: ignore[no-any-return]


def shift(values_BTX: Tensor, steps: int) -> Tensor:
    """values at index t + steps, zeros where there is none; [B, T, ...]."""
    if steps == 0:
        return values_BTX
    return torch.cat((values_BTX[:, steps:], torch.zeros_like(values_BTX[:, :steps])), dim=1)
