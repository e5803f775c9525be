# H hidden, F width of the MLP
"""The EAGLE-1 checkpoint that vLLM and SGLang load (arXiv 2401.15077): tensors by name, and a config for each engine.

Both engines take embedding and head from the target. What they drop or invent without a word decides what is written:

    fc.bias       vLLM has none and drops it, SGLang has one and leaves it random where the file has none: it is zeros
    lm_head, norm vLLM refuses them, SGLang has no use for them: never written, nor is a second embedding
    bias          a key that vLLM and SGLang read as the attention's bias: never written
    architectures vLLM puts `Eagle` before the name, SGLang has it behind: the one line in which the configs differ

Read in `llama_eagle.py` of vLLM 0.32 and of SGLang 0.5.23; the parity gate (farm/bench/parity.py) runs the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from farm.config import UserError
from farm.draft.config import DraftConfig
from farm.draft.model import Draft
from farm.draft.trunk import Trunk
from farm.export.engines import ARCHITECTURES, ServingEngine, StoredDtype
from farm.export.fold import GatedMlp, padded, side_by_side

LAYER = "layers.0."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NORM = f"{LAYER}post_attention_layernorm.weight"


def folded_mlp(draft: Draft, multiple: int) -> GatedMlp:
    """Shared and private expert as one MLP whose width is a multiple of `multiple`."""
    return padded(side_by_side(GatedMlp.of(draft.trunk.shared_expert), GatedMlp.of(draft.expert)), multiple)


def eagle_tensors(trunk: Trunk, mlp: GatedMlp, dtype: StoredDtype) -> dict[str, Tensor]:
    """Every tensor of the file, by name; the trunk's draft vocabulary is none of them, EAGLE-1 has no place for it.

    Raises UserError when a value is too large for the dtype.
    """
    h = trunk.config.hidden_size
    named = {
        "fc.weight": trunk.fc.weight,
        "fc.bias": torch.zeros(h),
        NORM: trunk.post_attention_layernorm.weight,
    }
    named |= {f"{LAYER}self_attn.{name}.weight": getattr(trunk, name).weight for name in ATTENTION}
    parts = (mlp.gate_FH, mlp.up_FH, mlp.down_HF)
    named |= {f"{LAYER}mlp.{name}.weight": part for name, part in zip(MLP, parts, strict=True)}
    stored = {name: value.detach().to(getattr(torch, dtype)).contiguous() for name, value in named.items()}
    for name, value in stored.items():
        if not bool(value.isfinite().all()):
            raise UserError(f"{name}: has values that {dtype} cannot hold; export with --dtype bfloat16")
    return stored


def eagle_config(
    draft: DraftConfig, width: int, max_positions: int, dtype: StoredDtype, engine: ServingEngine
) -> dict[str, Any]:
    """config.json: a Llama of one layer, whatever the target's type is.

    RoPE is said twice: `transformers` 5 and what rests on it read `rope_parameters`, older ones `rope_theta`.
    """
    return {
        "architectures": [ARCHITECTURES[engine]],
        "model_type": "llama",
        "hidden_size": draft.hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "num_attention_heads": draft.num_heads,
        "num_key_value_heads": draft.num_kv_heads,
        "head_dim": draft.head_dim,
        "rms_norm_eps": draft.rms_eps,
        "rope_theta": draft.rope_theta,
        "rope_parameters": {"rope_theta": draft.rope_theta, "rope_type": "default"},
        "max_position_embeddings": max_positions,
        "vocab_size": draft.vocab_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
