# B rows, T tokens, S positions read, H hidden, V vocab, N query heads, G key/value heads, D head size, F mlp width
"""A lean forward for Llama, Qwen2 and Qwen3 checkpoints: post-norm hidden states out of a slot cache.

`transformers` is the reference (a test compares the two). q/k/v and
gate/up are fused, rotary tables are made once, and a row is addressed by slot and position (farm/layers/cache.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from farm.layers.attention import (
    attend,
    causal_mask,
    plain_frequencies,
    rotary_tables,
    rotate,
    signed,
)
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

    def __init__(self, config: Any, weights: Mapping[str, Tensor], device: str = "cpu") -> None:
        """`config` is a `transformers` config of a supported type, `weights` its checkpoint's tensors by name.

        Raises ValueError for an architecture that this forward does not compute exactly, KeyError for a missing
        tensor, RuntimeError for one of a wrong shape.
        """
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
        self.max_positions: int = config.max_position_embeddings
        placed = {name: value.detach().to(device) for name, value in weights.items()}
        self.embedding: Tensor = placed["model.embed_tokens.weight"].view(self.vocab_size, self.hidden_size)
        tied = config.tie_word_embeddings or "lm_head.weight" not in placed
        self.head_weight: Tensor = self.embedding if tied else placed["lm_head.weight"]
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.norm_H: Tensor = placed["model.norm.weight"]
        self.layers = [_fuse(placed, f"model.layers.{i}.") for i in range(config.num_hidden_layers)]
        inv_freq, scaling = _rope(config, self.head_dim)
        # Slack for the drafted tokens that one verification may run past the last position.
        cos, sin = rotary_tables(inv_freq.to(device), self.max_positions + 64, scaling)
        self.cos, self.sin = cos.to(self.dtype), signed(sin).to(self.dtype)

    @classmethod
    def of(cls, model: Any) -> TargetForward:
        """The forward of a loaded `transformers` model."""
        return cls(model.config, model.state_dict(), str(model.device))

    @property
    def num_bytes(self) -> int:
        """Of weights in memory."""
        tensors = [
            self.embedding,
            self.norm_H,
            *([] if self.head_weight is self.embedding else [self.head_weight]),
        ]
        tensors += [value for layer in self.layers for value in vars(layer).values() if value is not None]
        return sum(value.nbytes for value in tensors)

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


def _rope(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [D / 2] and the factor on cos and sin."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return plain_frequencies(head_dim, float(rope.get("rope_theta", 10_000.0))), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return inv_freq, float(scaling)


def _fuse(weights: Mapping[str, Tensor], prefix: str) -> Layer:
    attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
    biases = [weights[f"{attention}{p}_proj.bias"] for p in "qkv" if f"{attention}{p}_proj.bias" in weights]
    return Layer(
        input_norm_H=weights[f"{prefix}input_layernorm.weight"],
        qkv_weight=torch.cat([weights[f"{attention}{p}_proj.weight"] for p in "qkv"]),
        qkv_bias=torch.cat(biases) if biases else None,
        q_norm_D=weights.get(f"{attention}q_norm.weight"),
        k_norm_D=weights.get(f"{attention}k_norm.weight"),
        out_weight=weights[f"{attention}o_proj.weight"],
        out_bias=weights.get(f"{attention}o_proj.bias"),
        post_norm_H=weights[f"{prefix}post_attention_layernorm.weight"],
        gate_up_weight=torch.cat([weights[f"{mlp}gate_proj.weight"], weights[f"{mlp}up_proj.weight"]]),
        down_weight=weights[f"{mlp}down_proj.weight"],
    )
