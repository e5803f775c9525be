# B rows, T tokens, M of these B T in products, S positions read, H hidden, V vocab, F mlp width
# N query heads, G key/value heads, D head size
"""A lean forward for Llama, Qwen2 and Qwen3 checkpoints: post-norm hidden states out of a slot cache.

`transformers` is the reference (a test compares the two). q/k/v and gate/up are fused, rotary tables are made once, a
row is addressed by slot and position (farm/layers/cache.py), and products leave the padding of ragged prompts out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from farm.layers.attention import Rotation, attend_cached, plain_frequencies, rotary_tables, signed
from farm.layers.by_row import ByRow
from farm.layers.cache import AnyRows, Site, SlotCache
from farm.layers.decoder import Decoder, TokenEnds, Weights
from farm.layers.dense import Dense, Gated, RmsNorm, swiglu
from farm.layers.lora import LoraRows, Part
from farm.sections import LONGEST_CHAIN
from farm.target.model import Reading

SUPPORTED = ("llama", "qwen2", "qwen3")
SLACK = LONGEST_CHAIN + 1  # positions that one verification may run past the last


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer."""

    input_norm: RmsNorm
    qkv: Dense  # [(N + 2 G) * D, H]
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    out: Dense  # [H, N * D]
    post_norm: RmsNorm
    gate_up: Gated  # two of [F, H]
    down: Dense  # [H, F]

    @property
    def weights(self) -> Weights:
        """As the kernels take them."""
        mlp = ((self.gate_up, self.down),)
        return Weights(self.input_norm, self.qkv, self.q_norm, self.k_norm, self.out, self.post_norm, mlp)

    @property
    def num_bytes(self) -> int:
        """Of its weights; biases and norms are a thousandth of them."""
        return sum(part.num_bytes for part in (self.qkv, self.out, self.gate_up, self.down))


@dataclass(frozen=True)
class Context:
    """What all layers of one call share. Products see the M `real_M` of B T tokens, attention sees all."""

    shape: tuple[int, int]  # B, T
    rotation: Rotation
    site: Site
    real_M: Tensor | None  # None: all, M = B T
    loras: LoraRows | None


class TargetForward:
    """Decoder of a target: `forward(tokens, rows, cache)` gives hidden states, `logits` applies the head.

    Attributes: `embedding` [V, H], `head_weight` [V, H], sizes, `dtype`, `device`.
    """

    capturable = True

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
        self.head_weight: Tensor = _head(placed, self.embedding, tied=config.tie_word_embeddings)
        self.head = Dense.of(self.head_weight)
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self.norm = RmsNorm.of(placed["model.norm.weight"].view(self.hidden_size), self.eps)
        heads = (self.num_heads, self.num_kv_heads, self.head_dim)
        sizes = _layer_sizes(config, heads)
        self.layers = [
            _fuse(_of_layer(placed, f"model.layers.{i}.", sizes), self.eps)
            for i in range(config.num_hidden_layers)
        ]
        self._decoder = Decoder.of([layer.weights for layer in self.layers], heads)
        self._ends = TokenEnds(self.embedding, self.head, norm=self.norm)
        inv_freq, scaling = _rope(config, self.head_dim)
        cos, sin = rotary_tables(inv_freq.to(device), self.max_positions + SLACK, scaling)
        self.cos, self.sin = cos.to(self.dtype), signed(sin).to(self.dtype)

    @classmethod
    def of(cls, model: Any) -> TargetForward:
        """The forward of a loaded `transformers` model."""
        return cls(model.config, model.state_dict(), str(model.device))

    @property
    def num_bytes(self) -> int:
        """Of weights in memory."""
        ends = self.embedding.nbytes
        if self.head_weight is not self.embedding:
            ends += self.head_weight.nbytes
        if self.device.type == "cpu":  # beside the plain one, which drafts prune to their vocabulary
            ends += self.head.num_bytes
        return ends + sum(layer.num_bytes for layer in self.layers)

    def new_cache(self, num_slots: int, capacity: int) -> SlotCache:
        """A cache for `num_slots` sequences of at most `capacity` positions."""
        return SlotCache.of(self, num_slots, capacity)

    @torch.inference_mode()
    def forward(
        self, tokens_BT: Tensor, rows: AnyRows, cache: SlotCache, loras: LoraRows | None = None
    ) -> Tensor:
        """Post-norm hidden states [B, T, H] of the tokens, each at its row's start + index; the cache is extended.

        `loras` adds to every product what the row's own LoRA says.
        Tokens of trees have their positions, and what they see, from `rows.branches`.
        """
        rotation, site = self._place(tokens_BT, rows, cache)
        real_M = None if loras is not None else rows.real(tokens_BT.shape[1], self.device)
        x_MH = functional.embedding(_pack(tokens_BT.reshape(-1), real_M), self.embedding)
        if self._decoder is not None and real_M is None:
            x_MH = self._decoder.extend(x_MH, rotation, site, ByRow(loras))
        else:
            context = Context((tokens_BT.shape[0], tokens_BT.shape[1]), rotation, site, real_M, loras)
            for index, layer in enumerate(self.layers):
                x_MH = self._layer(x_MH, index, layer, context)
        return _spread(self.norm(x_MH), real_M, tokens_BT.numel()).view(*tokens_BT.shape, self.hidden_size)

    @torch.inference_mode()
    def read(
        self, tokens_BT: Tensor, rows: AnyRows, cache: SlotCache, loras: LoraRows | None = None
    ) -> Reading:
        """As `forward`, with the logits after every token; one call of the kernels where there are any."""
        if self._decoder is None or not self._decoder.can_foretell(self._ends):
            hidden_BTH = self.forward(tokens_BT, rows, cache, loras)
            return Reading(hidden_BTH, self.logits(hidden_BTH))
        rotation, site = self._place(tokens_BT, rows, cache)
        told = self._decoder.foretell(tokens_BT, self._ends, rotation, site, ByRow(loras))
        hidden_BTH, logits_BTV = (x.view(*tokens_BT.shape, -1) for x in (told.hidden_MH, told.logits_MC))
        return Reading(hidden_BTH, logits_BTV, told.best_M.view(tokens_BT.shape))

    def _place(self, tokens_BT: Tensor, rows: AnyRows, cache: SlotCache) -> tuple[Rotation, Site]:
        window = cache.window(rows, tokens_BT.shape[1])
        n, g = self.num_heads + self.num_kv_heads, self.num_kv_heads
        rotation = Rotation((self.cos, self.sin), window.positions_BT, n, g)
        return rotation, window.site(self.num_heads // self.num_kv_heads)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of post-norm hidden states [..., H]."""
        return self.head(hidden.reshape(-1, self.hidden_size)).view(*hidden.shape[:-1], self.vocab_size)

    def _layer(self, x_MH: Tensor, index: int, layer: Layer, context: Context) -> Tensor:
        def adapted(part: Part, x_MX: Tensor, y_MY: Tensor) -> Tensor:
            return y_MY if context.loras is None else context.loras.add(index, part, x_MX, y_MY)

        real_M = context.real_M
        b, t = context.shape
        n, g, d = self.num_heads, self.num_kv_heads, self.head_dim
        normed_MH = layer.input_norm(x_MH)
        qkv_MX = adapted("qkv", normed_MH, layer.qkv(normed_MH))
        qkv_BTND = _spread(qkv_MX, real_M, b * t).view(b, t, n + 2 * g, d)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_BTND, k_BTGD = layer.q_norm(qkv_BTND[:, :, :n]), layer.k_norm(qkv_BTND[:, :, n : n + g])
            qkv_BTND = torch.cat((q_BTND, k_BTGD, qkv_BTND[:, :, n + g :]), dim=2)
        qkv_BTND = context.rotation(qkv_BTND)
        k_BGSD, v_BGSD = context.site.window.write(index, qkv_BTND[:, :, n:])
        mixed_BTX = attend_cached(qkv_BTND[:, :, :n], k_BGSD, v_BGSD, context.site.visible)
        mixed_MX = _pack(mixed_BTX.view(b * t, n * d), real_M)
        x_MH = adapted("out", mixed_MX, layer.out.add_to(x_MH, mixed_MX))
        normed_MH = layer.post_norm(x_MH)
        if context.loras is None:
            gated_MF = layer.gate_up(normed_MH)
        else:
            gated_MF = swiglu(adapted("gate_up", normed_MH, layer.gate_up.apart(normed_MH)))
        return adapted("down", gated_MF, layer.down.add_to(x_MH, gated_MF))


def _pack(x: Tensor, real_M: Tensor | None) -> Tensor:
    return x if real_M is None else x.index_select(0, real_M)


def _spread(x_MX: Tensor, real_M: Tensor | None, num_tokens: int) -> Tensor:
    if real_M is None:
        return x_MX
    return x_MX.new_zeros(num_tokens, x_MX.shape[1]).index_copy_(0, real_M, x_MX)


def _head(placed: Mapping[str, Tensor], embedding_VH: Tensor, *, tied: bool) -> Tensor:
    """The head [V, H]; a file that ties it and holds another one all the same means the other one.

    On `meta` it may be either. Raises KeyError where it is neither tied nor there, RuntimeError where it has another
    size.
    """
    if tied and "lm_head.weight" not in placed:
        return embedding_VH
    head_VH = placed["lm_head.weight"].view_as(embedding_VH)
    same = tied and not head_VH.is_meta and torch.equal(head_VH, embedding_VH)
    return embedding_VH if same else head_VH


def unsupported_reason(config: Any) -> str | None:
    """Why the lean forward would not compute this architecture exactly; None when it does."""
    if config.model_type not in SUPPORTED:
        return f"model_type {config.model_type!r} is not one of {', '.join(SUPPORTED)}"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized: what the files hold is not what is computed with"
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(config, "use_sliding_window", False) or kinds - {"full_attention"}:
        return "sliding-window attention is not supported"
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        return f"RoPE type {rope_type!r} depends on the sequence length"
    if not getattr(config, "is_causal", True):
        return "its attention is not causal"
    if config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        return "only a SwiGLU MLP without bias is supported"
    return None


def _rope(config: Any, head_dim: int) -> tuple[Tensor, float]:
    """Inverse frequencies [D / 2] and the factor on cos and sin. Raises ValueError where only a part is rotated."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return plain_frequencies(head_dim, float(rope.get("rope_theta", 10_000.0))), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    if 2 * len(inv_freq) != head_dim:
        raise ValueError(f"RoPE type {kind!r} rotates {2 * len(inv_freq)} of {head_dim} values of a head")
    return inv_freq, float(scaling)


def _layer_sizes(config: Any, heads: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """The tensors that a layer of this config has, by name, with their sizes; `heads` are N, G and D."""
    (n, g, d), hidden, width = heads, config.hidden_size, config.intermediate_size
    products = {
        "self_attn.q_proj": (n * d, hidden), "self_attn.k_proj": (g * d, hidden),
        "self_attn.v_proj": (g * d, hidden), "self_attn.o_proj": (hidden, n * d),
        "mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width),
    }  # fmt: skip
    biased = "qkvo" if getattr(config, "attention_bias", False) else ""
    if config.model_type == "qwen2":  # has no such option
        biased = "qkv"
    sizes: dict[str, tuple[int, ...]] = {f"{name}.weight": size for name, size in products.items()}
    sizes |= {f"self_attn.{p}_proj.bias": products[f"self_attn.{p}_proj"][:1] for p in biased}
    sizes |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    if config.model_type == "qwen3":
        sizes |= {f"self_attn.{p}_norm.weight": (d,) for p in "qk"}
    return sizes


def _of_layer(
    weights: Mapping[str, Tensor], prefix: str, sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """A layer's tensors by their names in it; others of its prefix are left out, as `transformers` leaves them out.

    Raises KeyError for a missing one, RuntimeError for one of another size: kernels would read past its end.
    """
    found = {name: weights[prefix + name] for name in sizes}
    for name, size in sizes.items():
        if found[name].shape != size:
            raise RuntimeError(
                f"{prefix}{name} is {list(found[name].shape)}, by the config it would be {list(size)}"
            )
    return found


def _fuse(weights: Mapping[str, Tensor], eps: float) -> Layer:
    """The layer of `_of_layer`'s tensors."""
    norms = [
        RmsNorm.of(weights[name], eps) for p in "qk" if (name := f"self_attn.{p}_norm.weight") in weights
    ]
    biases = [weights[name] for p in "qkv" if (name := f"self_attn.{p}_proj.bias") in weights]
    return Layer(
        input_norm=RmsNorm.of(weights["input_layernorm.weight"], eps),
        qkv=Dense.of(
            torch.cat([weights[f"self_attn.{p}_proj.weight"] for p in "qkv"]),
            torch.cat(biases) if biases else None,
        ),
        q_norm=norms[0] if norms else None,
        k_norm=norms[1] if norms else None,
        out=Dense.of(weights["self_attn.o_proj.weight"], weights.get("self_attn.o_proj.bias")),
        post_norm=RmsNorm.of(weights["post_attention_layernorm.weight"], eps),
        gate_up=Gated.of(weights["mlp.gate_proj.weight"], weights["mlp.up_proj.weight"]),
        down=Dense.of(weights["mlp.down_proj.weight"]),
    )
