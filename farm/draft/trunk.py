# B rows, T tokens, M of their B T positions, S positions read, H hidden
# N query heads, G key/value heads, P = 2 G, D head size
"""The part of a draft that all targets of a base share: fc, attention, norm and shared expert.

    u_t = W_f [e(x_{t+1}) ; h_t]            embedding first, no bias
    a_t = u_t + O Attention(u)_t            no input norm, RoPE at position t
    n_t = RMSNorm(a_t)
    trunk output: a_t + E_shared(n_t), n_t  the private expert adds E_private(n_t) to the first

EDA, arXiv 2603.09527, with one shared and one private expert, so that there is no router.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from farm.draft.config import DraftConfig
from farm.draft.expert import Expert
from farm.layers.attention import attend, plain_frequencies, rotary_tables, rotate, signed

# Past a sequence's end a verification may run by its drafted tokens, and a draft that catches up with others by what
# one of its forwards reads.
MAX_POSITIONS = 32_768 + 128 + 256

KeysValues = tuple[Tensor, Tensor]


class Changes(Protocol):
    """What a target adds to the trunk's products (farm/draft/delta.py)."""

    def change(self, part: Any) -> nn.Module | None:
        """Of `fc`, `qkv` or `out`: a map from the product's input to what is added to its output; None: nothing."""
        ...


class Trunk(nn.Module):
    """Everything of a draft but the private expert; frozen while adapting."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        # Token ids that drafts propose, int64; None: the full vocabulary. Not a weight, but moves with them.
        self.vocabulary_C: Tensor | None
        self.register_buffer("vocabulary_C", None, persistent=False)
        h, d = config.hidden_size, config.head_dim
        self.fc = nn.Linear(2 * h, h, bias=False)
        self.q_proj = nn.Linear(h, config.num_heads * d, bias=False)
        self.k_proj = nn.Linear(h, config.num_kv_heads * d, bias=False)
        self.v_proj = nn.Linear(h, config.num_kv_heads * d, bias=False)
        self.o_proj = nn.Linear(config.num_heads * d, h, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=config.rms_eps)
        self.shared_expert = Expert(h, config.shared_width)
        self.fused: Any = None  # the LeanTrunk that every draft of this trunk decodes with
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        embedded_BTH: Tensor,
        hidden_BTH: Tensor,
        positions_BT: Tensor,
        remember: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]],
        delta: Changes | None = None,
        at_M: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Residual with the shared expert added, and its normed input, both [B, T, H].

        `at_M` are indices into the B * T positions, ascending: what is put out is for them alone, [M, H]. All are read.

        `remember(kv_BTPD)` stores this step's keys and then values and returns what may be read: keys and values
        [B, G, S, D] and a boolean mask [B, 1, R * T, S] or None. Serving passes the slot cache, training the unrolled
        form of it, so that one forward serves both. `delta` is what the target changes.
        """
        b, t, _ = embedded_BTH.shape
        n, g, d = self.config.num_heads, self.config.num_kv_heads, self.config.head_dim
        x_BTX = torch.cat((embedded_BTH, hidden_BTH), dim=-1)
        u_BTH = _changed(self.fc(x_BTX), x_BTX, delta, "fc")
        cos_BT1D, sin_BT1D = self.rotary(positions_BT, u_BTH.dtype)
        qkv_BTY = torch.cat((self.q_proj(u_BTH), self.k_proj(u_BTH), self.v_proj(u_BTH)), dim=-1)
        qkv_BTND = _changed(qkv_BTY, u_BTH, delta, "qkv").view(b, t, n + 2 * g, d)
        q_BTND, k_BTGD, v_BTGD = qkv_BTND.tensor_split([n, n + g], dim=2)
        kv_BTPD = torch.cat((rotate(k_BTGD, cos_BT1D, sin_BT1D), v_BTGD), dim=2)
        k_BGSD, v_BGSD, mask = remember(kv_BTPD)
        mixed_BTX = attend(rotate(q_BTND, cos_BT1D, sin_BT1D), k_BGSD, v_BGSD, mask)
        if at_M is not None:
            u_BTH, mixed_BTX = (whole.flatten(0, 1)[at_M] for whole in (u_BTH, mixed_BTX))
        a_BTH = u_BTH + _changed(self.o_proj(mixed_BTX), mixed_BTX, delta, "out")
        n_BTH = self.post_attention_layernorm(a_BTH)
        return a_BTH + self.shared_expert(n_BTH), n_BTH

    def tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin [S, D] of every position, sin as `signed` makes it, fp32."""
        # Kept outside the state dict: the tables follow from the config, and a trunk built on meta has none yet.
        if self._tables is None or self._tables[0].device != device:
            frequencies = plain_frequencies(self.config.head_dim, self.config.rope_theta).to(device)
            cos, sin = rotary_tables(frequencies, MAX_POSITIONS)
            self._tables = cos, signed(sin)
        return self._tables

    def rotary(self, positions_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        cos, sin = self.tables(positions_BT.device)
        return cos[positions_BT].unsqueeze(2).to(dtype), sin[positions_BT].unsqueeze(2).to(dtype)


def _changed(product: Tensor, x: Tensor, delta: Changes | None, part: str) -> Tensor:
    change = None if delta is None else delta.change(part)
    return product if change is None else product + change(x)
