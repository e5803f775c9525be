# M masked positions, H hidden, C draft vocabulary
"""Losses of a draft: sums over positions, to be divided by the global number of positions.

    L = sum_s w_s / M_s sum_m [ CE(p~, q) + lambda smoothL1(h^, h) ]        w = 1, 0.8, 0.64 ...

p~ is the target's distribution restricted to the draft vocabulary and renormalised, q the draft's.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

STEP_DECAY = 0.8  # weight of unrolled step s is STEP_DECAY ** s (EAGLE-3)
HIDDEN_WEIGHT = 0.5  # lambda


def soft_cross_entropy(draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Tensor:
    """- sum_m sum_c p~_c log q_c, fp32 scalar; gradients flow into the draft's logits only.

    The forward KL divergence up to the entropy of p~, which is constant (DistillSpec 2310.08461, eq. 2).
    """
    p_MC = target_logits_MC.detach().float().softmax(dim=-1)
    return -(p_MC * draft_logits_MC.float().log_softmax(dim=-1)).sum()


def smooth_l1(predicted_MH: Tensor, hidden_MH: Tensor) -> Tensor:
    """sum_m mean_h smoothL1(h^ - h) with beta = 1, fp32 scalar (EAGLE 2401.15077, section 3.2)."""
    total = functional.smooth_l1_loss(predicted_MH.float(), hidden_MH.detach().float(), reduction="sum")
    return total / predicted_MH.shape[-1]


def acceptance(draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Tensor:
    """sum_m sum_c min(p~_c, q_c): expected accepted tokens of these positions when sampling at temperature 1."""
    p_MC, q_MC = target_logits_MC.float().softmax(dim=-1), draft_logits_MC.float().softmax(dim=-1)
    return p_MC.minimum(q_MC).sum().detach()
