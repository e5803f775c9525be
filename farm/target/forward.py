# B rows, T tokens, S positions read, H hidden, V vocab, N query heads, G key/value heads, D head size, F mlp width
"""A lean forward for Llama, Qwen2 and Qwen3 checkpoints: post-norm hidden states out of a slot cache.

`transformers` is the reference (a test compares the two); it loads the weights, this module runs them. q/k/v and
gate/up are fused, rotary tables are made once, and a row is addressed by slot and position (farm/layers/cache.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from farm.layers.attention import attend, causal_mask, rotary_tables, rotate, signed
from farm.layers.cache import Rows, SlotCache

SUPPORTED = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer."""

    input_norm_H: Tensor
    qkv_weight: Tensor  # [(N + 2 G) * D, H]
    qkv_bias: Tensor | None
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    out_weight: Tensor  # [H, N * D]
    out_bias: Tensor | None
    post_norm_H: Tensor
    gate_up_weight: Tensor  # [2 F, H]
    down_weight: Tensor  # [H, F]


class TargetForward:
    """Decoder of a target: `forward(tokens, rows, cache)` gives hidden states, `logits` applies the head.

    Attributes: `embedding` [V, H], `head_weight` [V, H], sizes, `dtype`, `device`.
    """

    def __init__(self, model: Any, max_positions: int | None = None) -> None:
        """`model` is a loaded `transformers` causal LM of a supported type; its weights are referenced or fused.

        Raises ValueError for an architecture that this forward does not compute exactly.
        """
        config = model.config
        reason = unsupported_reason(config)
        if reason:
            raise ValueError(reason)
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.eps: float = config.rms_norm_eps
        self.max_positions: int = max_positions or config.max_position_embeddings
        decoder = model.model
        self.embedding: Tensor = decoder.embed_tokens.weight.detach()
        self.head_weight: Tensor = model.lm_head.weight.detach()
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.norm_H: Tensor = decoder.norm.weight.detach()
        self.layers = [_fuse(layer) for layer in decoder.layers]
        rope = decoder.rotary_emb
        # Slack for the drafted tokens that one verification may run past the last position.
        tables = rotary_tables(rope.inv_freq, self.max_positions + 64, rope.attention_scaling)
        self.cos, self.sin = tables[0].to(self.dtype), signed(tables[1]).to(self.dtype)

    def new_cache(self, num_slots: int, capacity: int) -> SlotCache:
        """A cache for `num_slots` sequences of at most `capacity` positions."""
        shape = (self.num_kv_heads, self.head_dim)
        return SlotCache(len(self.layers), num_slots, capacity, shape, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, tokens_BT: Tensor, rows: Rows, cache: SlotCache) -> Tensor:
        """Post-norm hidden states [B, T, H] of the tokens, each at its row's start + index; the cache is extended."""
        num_tokens = tokens_BT.shape[1]
        positions_BT = rows.positions(num_tokens, self.device)
        cos_BT1D, sin_BT1D = self.cos[positions_BT].unsqueeze(2), self.sin[positions_BT].unsqueeze(2)
        mask = causal_mask(positions_BT, rows.context(num_tokens), self.num_heads // self.num_kv_heads)
        x_BTH = functional.embedding(tokens_BT, self.embedding)
        for index, layer in enumerate(self.layers):
            x_BTH = self._layer(x_BTH, index, layer, (cos_BT1D, sin_BT1D, mask, rows, cache))
        return functional.rms_norm(x_BTH, (self.hidden_size,), self.norm_H, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of post-norm hidden states [..., H]."""
        return functional.linear(hidden, self.head_weight)

    def _layer(
        self,
        x_BTH: Tensor,
        index: int,
        layer: Layer,
        context: tuple[Tensor, Tensor, Tensor | None, Rows, SlotCache],
    ) -> Tensor:
        cos_BT1D, sin_BT1D, mask, rows, cache = context
        b, t, _ = x_BTH.shape
        n, g, d = self.num_heads, self.num_kv_heads, self.head_dim
        normed_BTH = functional.rms_norm(x_BTH, (self.hidden_size,), layer.input_norm_H, self.eps)
        qkv_BTND = functional.linear(normed_BTH, layer.qkv_weight, layer.qkv_bias).view(b, t, n + 2 * g, d)
        qk_BTND, v_BTGD = qkv_BTND[:, :, : n + g], qkv_BTND[:, :, n + g :]
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q_BTND = functional.rms_norm(qk_BTND[:, :, :n], (d,), layer.q_norm_D, self.eps)
            k_BTGD = functional.rms_norm(qk_BTND[:, :, n:], (d,), layer.k_norm_D, self.eps)
            qk_BTND = torch.cat((q_BTND, k_BTGD), dim=2)
        qk_BTND = rotate(qk_BTND, cos_BT1D, sin_BT1D)
        k_BSGD, v_BSGD = cache.update(index, rows, qk_BTND[:, :, n:], v_BTGD)
        mixed = attend(qk_BTND[:, :, :n], k_BSGD, v_BSGD, mask)
        x_BTH = x_BTH + functional.linear(mixed, layer.out_weight, layer.out_bias)
        normed_BTH = functional.rms_norm(x_BTH, (self.hidden_size,), layer.post_norm_H, self.eps)
        gate, up = functional.linear(normed_BTH, layer.gate_up_weight).chunk(2, dim=-1)
        return x_BTH + functional.linear(functional.silu(gate) * up, layer.down_weight)


def unsupported_reason(config: Any) -> str | None:
    """Why the lean forward would not compute this architecture exactly; None when it does."""
    if config.model_type not in SUPPORTED:
        return f"model_type {config.model_type!r} is not one of {', '.join(SUPPORTED)}"
    if getattr(config, "use_sliding_window", False):
        return "sliding-window attention is not supported"
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        return f"RoPE type {rope_type!r} depends on the sequence length"
    if config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        return "only a SwiGLU MLP without bias is supported"
    return None


def _fuse(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [p.bias.detach() for p in projections if p.bias is not None]
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        input_norm_H=layer.input_layernorm.weight.detach(),
        qkv_weight=torch.cat([p.weight.detach() for p in projections]),
        qkv_bias=torch.cat(biases) if biases else None,
        q_norm_D=None if q_norm is None else q_norm.weight.detach(),
        k_norm_D=None if k_norm is None else k_norm.weight.detach(),
        out_weight=attention.o_proj.weight.detach(),
        out_bias=None if attention.o_proj.bias is None else attention.o_proj.bias.detach(),
        post_norm_H=layer.post_attention_layernorm.weight.detach(),
        gate_up_weight=torch.cat([mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()]),
        down_weight=mlp.down_proj.weight.detach(),
    )
