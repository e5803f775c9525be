"""The other way: a public EAGLE-1 checkpoint becomes a trunk, so that a family can start without training one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farm.config import UserError
from farm.draft.checkpoint import read_tensors, trunk_files
from farm.draft.config import DraftConfig
from farm.draft.expert import Expert
from farm.export.eagle import ATTENTION, LAYER, MLP, NORM
from farm.export.folder import new_folder
from farm.target.weights import weight_files

PICKLE_FILE = "pytorch_model.bin"
# Tensors that checkpoints carry and a draft has no use for: the embedding is the target's, frequencies follow from the
# config.
UNUSED = ("embed_tokens.weight", f"{LAYER}self_attn.rotary_emb.inv_freq")
INIT_STD = 0.02


def trunk_of_eagle(folder: Path, private_width: int | None = None, seed: int = 0) -> dict[str, bytes]:
    """The files of a trunk whose shared expert is the checkpoint's MLP.

    The private expert beside it is 0 in its last matrix, so that the trunk drafts what the checkpoint does, and random
    in the others, so that adapting has a gradient. Its width is the MLP's unless given. Raises UserError, naming the
    reason, for what is no EAGLE-1 draft of a Llama's shape.
    """
    folder = folder.expanduser()
    described = _read_config(folder)
    tensors = _read_tensors(folder)
    _check_biases(folder, tensors)
    wanted = {"fc.weight": "fc.weight", NORM: "post_attention_layernorm.weight"}
    wanted |= {f"{LAYER}self_attn.{name}.weight": f"{name}.weight" for name in ATTENTION}
    wanted |= {f"{LAYER}mlp.{name}.weight": f"shared_expert.{name}.weight" for name in MLP}
    weights = {name: value for name, value in tensors.items() if not name.endswith(".bias")}
    missing, foreign = wanted.keys() - weights.keys(), weights.keys() - wanted.keys() - set(UNUSED)
    if missing or foreign:
        raise UserError(
            f"{folder}: is no EAGLE-1 checkpoint (missing: {_listed(missing)}; not of the format: {_listed(foreign)})"
        )
    config = _draft_config(folder, described, private_width)
    trunk = {ours: weights[theirs].float().contiguous() for theirs, ours in wanted.items()}
    return trunk_files(config, trunk, _quiet_expert(config, seed), None)


def write_trunk(files: Mapping[str, bytes], out: Path) -> None:
    """Writes the files as a new folder, whole or not at all. Raises UserError when `out` holds something."""
    with new_folder(out) as (folder, _):
        for name, data in files.items():
            (folder / name).write_bytes(data)


def _draft_config(folder: Path, described: Mapping[str, Any], private_width: int | None) -> DraftConfig:
    """The draft's sizes, as both generations of `transformers` name them."""
    rope = described.get("rope_parameters") or described.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise UserError(f"{folder}/config.json: its RoPE is scaled ({rope}); a trunk has plain RoPE only")
    try:
        hidden, heads, width = (
            int(described[name]) for name in ("hidden_size", "num_attention_heads", "intermediate_size")
        )
        return DraftConfig(
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=int(described.get("num_key_value_heads") or heads),
            head_dim=int(described.get("head_dim") or hidden // heads),
            shared_width=width,
            private_width=private_width or width,
            rms_eps=float(described["rms_norm_eps"]),
            rope_theta=float(described.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            vocab_size=int(described["vocab_size"]),
        )
    except KeyError as error:
        raise UserError(f"{folder}/config.json: says no {error}; give the checkpoint's own config") from None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        described: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is no config of a checkpoint ({error}); give an EAGLE-1 folder") from error
    names = " ".join(described.get("architectures") or ())
    later = [
        name for name in ("draft_vocab_size", "eagle_config", "speculators_model_type") if name in described
    ]
    if later or "Eagle3" in names:
        raise UserError(
            f"{folder}: is an EAGLE-3 or speculators draft ({later or names}); a trunk is EAGLE-1"
        )
    for field, fits in (("model_type", "llama"), ("num_hidden_layers", 1), ("hidden_act", "silu")):
        if described.get(field, fits) != fits:
            raise UserError(f"{path}: {field} is {described[field]!r}; a trunk is one Llama layer, {fits!r}")
    return described


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """By name; from safetensors, or from the pickle that older checkpoints come as, of which only tensors are read."""
    files, pickled = weight_files(folder), folder / PICKLE_FILE
    if files or not pickled.is_file():
        tensors: dict[str, Tensor] = {}
        for file in files or [folder / "model.safetensors"]:
            tensors |= read_tensors(file)
        return tensors
    try:
        found: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(f"{pickled}: cannot be read as tensors ({error}); copy the file again") from error
    return found


def _check_biases(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        if name.endswith(".bias") and bool(value.any()):
            raise UserError(
                f"{folder}: {name} is not 0, and a trunk has no biases; vLLM would drop it without a word, too"
            )


def _quiet_expert(config: DraftConfig, seed: int) -> dict[str, Tensor]:
    expert = Expert(config.hidden_size, config.private_width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (expert.gate_proj.weight, expert.up_proj.weight):
            parameter.normal_(0.0, INIT_STD, generator=generator)
        expert.down_proj.weight.zero_()
    return {name: value.detach() for name, value in expert.state_dict().items()}


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
