# B rows, T tokens, S positions read, H hidden, N query heads, G key/value heads, D head size, F expert width
"""A draft as decoding runs it: the arithmetic of model.py with q/k/v and gate/up fused and no module calls.

A draft step of a small model is bound by operators, not by bytes, and speculation pays only while k of them cost
little beside one step of the target. A test holds this forward to the module's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from farm.draft.expert import Expert
from farm.draft.model import Draft
from farm.draft.trunk import Trunk
from farm.layers.attention import attend, rotate


@dataclass(frozen=True)
class LeanExpert:
    """D(silu(G n) * (U n)) with G and U in one product."""

    gate_up_weight: Tensor  # [2 F, H]
    down_weight: Tensor  # [H, F]

    @classmethod
    def of(cls, expert: Expert) -> LeanExpert:
        gate_up = torch.cat((expert.gate_proj.weight.detach(), expert.up_proj.weight.detach()))
        return cls(gate_up, expert.down_proj.weight.detach())

    def __call__(self, normed_BTH: Tensor) -> Tensor:
        gate, up = functional.linear(normed_BTH, self.gate_up_weight).chunk(2, dim=-1)
        return functional.linear(functional.silu(gate) * up, self.down_weight)


@dataclass(frozen=True)
class LeanTrunk:
    """The fused weights of a trunk; drafts of one trunk share them."""

    trunk: Trunk
    qkv_weight: Tensor  # [(N + 2 G) * D, H]
    shared_expert: LeanExpert

    @classmethod
    def of(cls, trunk: Trunk) -> LeanTrunk:
        """The fused form of a trunk, made once; move the trunk to its device before."""
        if trunk.fused is None:
            projections = (trunk.q_proj, trunk.k_proj, trunk.v_proj)
            qkv_weight = torch.cat([p.weight.detach() for p in projections])
            trunk.fused = cls(trunk, qkv_weight, LeanExpert.of(trunk.shared_expert))
        fused: LeanTrunk = trunk.fused
        return fused


class LeanDraft:
    """Predicted hidden states of one draft; called like `Draft`, without gradients."""

    def __init__(self, draft: Draft) -> None:
        self.config = draft.config
        self.vocabulary_C = draft.trunk.vocabulary_C
        self._lean = LeanTrunk.of(draft.trunk)
        self._expert = LeanExpert.of(draft.expert)

    def __call__(
        self,
        embedded_BTH: Tensor,
        hidden_BTH: Tensor,
        positions_BT: Tensor,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]],
    ) -> Tensor:
        """Predicted hidden state [B, T, H]; see Trunk.forward for the arguments."""
        trunk, (b, t, h) = self._lean.trunk, embedded_BTH.shape
        n, g, d = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        u_BTH = functional.linear(torch.cat((embedded_BTH, hidden_BTH), dim=-1), trunk.fc.weight)
        qkv_BTND = functional.linear(u_BTH, self._lean.qkv_weight).view(b, t, n + 2 * g, d)
        qk_BTND = rotate(qkv_BTND[:, :, : n + g], *trunk.rotary(positions_BT, u_BTH.dtype))
        k_BSGD, v_BSGD, mask = remember(qk_BTND[:, :, n:], qkv_BTND[:, :, n + g :])
        mixed = attend(qk_BTND[:, :, :n], k_BSGD, v_BSGD, mask)
        a_BTH = u_BTH + functional.linear(mixed, trunk.o_proj.weight)
        norm = trunk.post_attention_layernorm
        n_BTH = functional.rms_norm(a_BTH, (h,), norm.weight, self.config.rms_eps)
        return a_BTH + self._lean.shared_expert(n_BTH) + self._expert(n_BTH)
