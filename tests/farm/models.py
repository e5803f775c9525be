"""Tiny random models of every supported type, made in memory."""

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from farm.draft.config import DraftConfig
from farm.draft.delta import TrunkDelta
from farm.draft.model import Draft, new_draft
from farm.layers.lora import Part
from farm.target.forward import TargetForward

TYPES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def sharpened(model: Any, scale: float) -> Any:
    """The model with larger weights, so that its distributions are far from uniform, and with biases that matter."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.mul_(scale)
        elif "bias" in name:
            parameter.normal_(0.0, 0.5)
    return model


def tiny_model(
    kind: str = "llama", *, vocab: int = 32, hidden: int = 32, layers: int = 2, seed: int = 0, **options: Any
) -> Any:
    """A causal LM whose distributions are far from uniform, fp32, eval mode."""
    config_class, model_class = TYPES[kind]
    sizes = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,  # the smallest that the kernels for the CPU attend with
        "max_position_embeddings": 256,
    } | options
    torch.manual_seed(seed)
    config = config_class(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, **sizes
    )
    model = model_class(config).eval().requires_grad_(False)
    return sharpened(model, 8.0)


def tiny_pair(kind: str = "llama", *, seed: int = 0, **options: Any) -> tuple[TargetForward, Draft]:
    """A target and an unrelated random draft, the adversarial case of every losslessness test."""
    model = tiny_model(kind, seed=seed, **options)
    draft = new_draft(DraftConfig.for_base(model.config), seed=seed + 1, std=0.3)
    return TargetForward.of(model), draft.requires_grad_(False)


def random_delta(config: DraftConfig, ranks: dict[Part, int], seed: int) -> TrunkDelta:
    """Changes to a trunk that are large enough to change what is drafted."""
    delta, generator = TrunkDelta.empty(config, ranks), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return delta.requires_grad_(False)


def talkative(tokenizer: Any, *, end_logit: float = 6.0) -> Any:
    """A causal LM that says about a dozen random tokens before its end token: none depends on those before."""
    model = tiny_model(
        vocab=len(tokenizer), hidden=32, eos_token_id=tokenizer.eos_token_id, pad_token_id=None
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(5))
        model.model.embed_tokens.weight[:, 0] = 3.0  # the same in every state, about sqrt(32) after the norm
        model.lm_head.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(6))
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = end_logit / 32**0.5
    return model
