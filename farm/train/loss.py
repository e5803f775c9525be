# M masked positions, H hidden, C draft vocabulary
"""Losses of a draft, one number a position, over logits of the draft vocabulary at temperature 1.

    p  the target's distribution, restricted to the draft vocabulary and renormalised; no gradient
    q  the draft's
    alpha = sum_c min(p_c, q_c) = 1 - TV(p, q), the probability that a drafted token is accepted (2211.17192, cor. 3.6)

A mean over positions, its weights and the AdaSPEC filter are taken elsewhere (farm/train/module.py, adaspec.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

STEP_DECAY: Final = 0.8  # weight of unrolled step s is STEP_DECAY ** s (EAGLE-3)
LK_DECAY: Final = 3.0  # of the weight of KL in `lk`
EDA_CROSS_ENTROPY: Final = 0.1  # beside a smooth L1 of weight 1


def soft_cross_entropy(draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Tensor:
    """- sum_c p_c log q_c, [M], fp32 or wider; like all here, gradients flow into the draft's logits only."""
    p_MC = _wide(target_logits_MC.detach()).softmax(dim=-1)
    return -(p_MC * _wide(draft_logits_MC).log_softmax(dim=-1)).sum(dim=-1)


def forward_kl(draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Tensor:
    """sum_c p_c (log p_c - log q_c), [M] (DistillSpec 2310.08461, eq. 2): soft cross-entropy less the entropy of p."""
    log_p_MC = _wide(target_logits_MC.detach()).log_softmax(dim=-1)
    return (log_p_MC.exp() * (log_p_MC - _wide(draft_logits_MC).log_softmax(dim=-1))).sum(dim=-1)


def acceptance(draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Tensor:
    """alpha, [M]."""
    p_MC = _wide(target_logits_MC.detach()).softmax(dim=-1)
    return p_MC.minimum(_wide(draft_logits_MC).softmax(dim=-1)).sum(dim=-1)


def total_variation(draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Tensor:
    """1 - alpha, [M] (DistillSpec, table 1): its gradient vanishes where p and q have nothing in common."""
    return 1.0 - acceptance(draft_logits_MC, target_logits_MC)


def lk(draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Tensor:
    """lambda KL + (1 - lambda) TV with lambda = exp(-3 alpha), no gradient through lambda; [M] (LK losses 2602.23881).

    KL where the draft is far off, TV where it is close.
    """
    alpha_M = acceptance(draft_logits_MC, target_logits_MC)
    weight_M = torch.exp(-LK_DECAY * alpha_M.detach())
    return weight_M * forward_kl(draft_logits_MC, target_logits_MC) + (1.0 - weight_M) * (1.0 - alpha_M)


def lk_log(draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Tensor:
    """- log alpha, [M] (LK losses): the gradient of TV over alpha."""
    alpha_M = acceptance(draft_logits_MC, target_logits_MC)
    return -alpha_M.clamp(min=torch.finfo(alpha_M.dtype).tiny).log()


def eda_cross_entropy(draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Tensor:
    """The distribution term of EDA's loss, 0.1 CE, [M]; its smooth L1 has weight 1 (`hidden_weight`)."""
    return EDA_CROSS_ENTROPY * soft_cross_entropy(draft_logits_MC, target_logits_MC)


LOSSES: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "eda": eda_cross_entropy,
    "kl": forward_kl,
    "tv": total_variation,
    "lk": lk,
    "lk-log": lk_log,
}


@dataclass(frozen=True)
class Graded:
    """A loss with its gradient, taken by hand; no autograd graph is made."""

    loss_M: Tensor
    gradient_MC: Tensor  # with respect to the draft's logits
    divergence_M: Tensor  # forward KL
    alpha_M: Tensor


def graded(name: str, draft_logits_MC: Tensor, target_logits_MC: Tensor) -> Graded:
    """A loss of LOSSES in closed form, in few passes over the logits.

        d KL / dz = q - p          d alpha / dz_c = q_c (1[q_c < p_c] - A),  A = sum of q where q < p

    Every loss's gradient is a (q - p) + b d alpha / dz with one a and b a position.
    """
    z_MC, t_MC = _wide(draft_logits_MC), _wide(target_logits_MC)
    p_MC, q_MC = t_MC.softmax(dim=-1), z_MC.softmax(dim=-1)
    alpha_M = p_MC.minimum(q_MC).sum(dim=-1)
    normalizer_M = _log_sum_exp(z_MC, q_MC)
    divergence_M = torch.linalg.vecdot(p_MC, t_MC - z_MC) + normalizer_M - _log_sum_exp(t_MC, p_MC)
    weight_M = torch.exp(-LK_DECAY * alpha_M)
    one_M, zero_M = torch.ones_like(alpha_M), torch.zeros_like(alpha_M)
    safe_M = alpha_M.clamp(min=torch.finfo(alpha_M.dtype).tiny)
    if name == "eda":
        loss_M = EDA_CROSS_ENTROPY * (normalizer_M - torch.linalg.vecdot(p_MC, z_MC))
        of_kl_M, of_alpha_M = EDA_CROSS_ENTROPY * one_M, zero_M
    elif name == "kl":
        loss_M, of_kl_M, of_alpha_M = divergence_M, one_M, zero_M
    elif name == "tv":
        loss_M, of_kl_M, of_alpha_M = 1.0 - alpha_M, zero_M, -one_M
    elif name == "lk":
        loss_M = weight_M * divergence_M + (1.0 - weight_M) * (1.0 - alpha_M)
        of_kl_M, of_alpha_M = weight_M, weight_M - 1.0
    else:
        loss_M, of_kl_M, of_alpha_M = -safe_M.log(), zero_M, torch.where(alpha_M < safe_M, 0.0, -1.0 / safe_M)
    if name in ("eda", "kl"):
        return Graded(loss_M, (q_MC - p_MC).mul_(of_kl_M[:, None]), divergence_M, alpha_M)
    # On a CPU a comparison and a choice by it take three times as long as a sign, cut off below 0.
    below_MC = (p_MC - q_MC).sign_().relu_().mul_(q_MC)
    of_q_M = of_kl_M - of_alpha_M * below_MC.sum(dim=-1)
    gradient_MC = below_MC.mul_(of_alpha_M[:, None]).addcmul_(q_MC, of_q_M[:, None])
    if name == "lk":
        gradient_MC.addcmul_(p_MC, of_kl_M[:, None], value=-1)
    return Graded(loss_M, gradient_MC, divergence_M, alpha_M)


def _log_sum_exp(logits_MC: Tensor, probabilities_MC: Tensor) -> Tensor:
    """log sum_c exp(logits), [M], from their softmax: log p_c = z_c - log sum exp z at the largest of them."""
    return logits_MC.amax(dim=-1) - probabilities_MC.amax(dim=-1).log()


def smooth_l1(predicted_MH: Tensor, hidden_MH: Tensor) -> Tensor:
    """mean_h smoothL1(h^ - h) with beta = 1, [M] (EAGLE 2401.15077, section 3.2)."""
    predicted_MH, hidden_MH = _wide(predicted_MH), _wide(hidden_MH.detach())
    return functional.smooth_l1_loss(predicted_MH, hidden_MH, reduction="none").mean(dim=-1)


def _wide(values: Tensor) -> Tensor:
    """In float32, or as it is where that is wider."""
    return values if values.dtype == torch.float64 else values.float()
