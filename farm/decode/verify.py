# B rows, K drafted tokens, V vocabulary
"""Lossless verification of a drafted chain: pure functions of probabilities and uniform numbers.

Speculative sampling (Leviathan et al. 2211.17192, alg. 1): x_i ~ q_i is accepted with min(1, p_i(x_i) / q_i(x_i));
at the first rejection the token comes from norm(max(p_i - q_i, 0)), after K acceptances from p_{K+1}.
p and q are the distributions after all sampling settings; q is the one the token was really drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.decode.sampling import draw


@dataclass(frozen=True)
class Verdict:
    """What one verification decided: `num_accepted_B` in 0..K, and the token that follows the accepted ones."""

    num_accepted_B: Tensor
    next_B: Tensor


def verify_greedy(
    drafted: Sequence[Sequence[int]], best: Sequence[Sequence[int]], lengths: Sequence[int]
) -> list[int]:
    """How many drafted tokens each row accepts: those before the first that is not the target's choice.

    `best[b]` holds the target's argmax at every drafted position and after the last; row b has drafted `lengths[b]`
    tokens, what follows them is padding. Comparing a few integers takes less than the operators that would do it.
    """
    num_accepted = []
    for tokens, choices, length in zip(drafted, best, lengths, strict=True):
        pairs = enumerate(zip(tokens[:length], choices, strict=False))
        num_accepted.append(next((i for i, (token, choice) in pairs if token != choice), length))
    return num_accepted


def verify_sampled(
    drafted_BK: Tensor,
    p_BK1V: Tensor,
    q_BKV: Tensor,
    accept_BK: Tensor,
    next_u_B: Tensor,
    lengths_B: Tensor,
) -> Verdict:
    """Speculative sampling of a chain.

    Args:
        drafted_BK: proposed tokens, each drawn from its q; row b's padding begins at `lengths_B[b]`.
        p_BK1V: target probabilities [B, K + 1, V] at every drafted position and after the last.
        q_BKV: draft probabilities [B, K, V]; 0 outside a pruned draft vocabulary.
        accept_BK, next_u_B: uniform numbers in [0, 1), float64.
    """
    ratio_BK = acceptance(drafted_BK, p_BK1V[:, :-1], q_BKV)
    accepted_BK = (accept_BK.to(ratio_BK.device) < ratio_BK) & within(lengths_B, drafted_BK)
    num_accepted_B = prefix_length(accepted_BK)
    follow_BV = next_distribution(num_accepted_B, p_BK1V, q_BKV, lengths_B)
    return Verdict(num_accepted_B, draw(follow_BV, next_u_B))


def within(lengths_B: Tensor, drafted_BK: Tensor) -> Tensor:
    """Which entries [B, K] were drafted; the others are padding."""
    return torch.arange(drafted_BK.shape[1], device=drafted_BK.device) < lengths_B[:, None]


def acceptance(drafted_BK: Tensor, p_BKV: Tensor, q_BKV: Tensor) -> Tensor:
    """min(1, p(x) / q(x)) [B, K] in float64 of each drafted x, which q must be able to draw."""
    p_BK = p_BKV.gather(-1, drafted_BK[..., None]).squeeze(-1).to(torch.float64)
    q_BK = q_BKV.gather(-1, drafted_BK[..., None]).squeeze(-1).to(torch.float64)
    assert bool((q_BK > 0).all()), "a drafted token has probability 0 under the draft it is said to come from"
    return (p_BK / q_BK).clamp(max=1.0)


def next_distribution(num_accepted_B: Tensor, p_BK1V: Tensor, q_BKV: Tensor, lengths_B: Tensor) -> Tensor:
    """Distribution [B, V], not normalised, of the token after the accepted prefix.

    It is max(p - q, 0) at a rejected position and p after the last one. Where rounding leaves no residual, p.
    """
    rows_B = torch.arange(p_BK1V.shape[0], device=p_BK1V.device)
    p_BV = p_BK1V[rows_B, num_accepted_B]
    if q_BKV.shape[1] == 0:
        return p_BV
    rejected_B1 = (num_accepted_B < lengths_B)[:, None]
    q_BV = q_BKV[rows_B, num_accepted_B.clamp(max=q_BKV.shape[1] - 1)]
    residual_BV = (p_BV - torch.where(rejected_B1, q_BV, 0.0)).clamp(min=0.0)
    return torch.where(residual_BV.sum(dim=-1, keepdim=True) > 0, residual_BV, p_BV)


def prefix_length(accepted_BK: Tensor) -> Tensor:
    """Length [B] of the leading run of True in each row."""
    return accepted_BK.to(torch.int64).cumprod(dim=1).sum(dim=1)
