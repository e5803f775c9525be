"""Trunk and private expert as safetensors files, stored apart and loaded strictly by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from farm.config import UserError
from farm.draft.config import DraftConfig
from farm.draft.expert import Expert
from farm.draft.model import Draft
from farm.draft.trunk import Trunk

CONFIG_FILE, TRUNK_FILE, EXPERT_FILE = "draft.json", "trunk.safetensors", "expert.safetensors"
VOCABULARY = "draft_vocabulary"


def trunk_files(
    config: DraftConfig, trunk: Mapping[str, Tensor], expert: Mapping[str, Tensor], vocabulary: Tensor | None
) -> dict[str, bytes]:
    """The files of a trunk: config, trunk tensors with the draft vocabulary, and the base's private expert."""
    extra = {} if vocabulary is None else {VOCABULARY: vocabulary.to(torch.int64).contiguous()}
    return {
        CONFIG_FILE: json.dumps(config.to_dict(), indent=1).encode(),
        TRUNK_FILE: save({**trunk, **extra}),
        EXPERT_FILE: save(dict(expert)),
    }


def read_config(folder: Path) -> DraftConfig:
    """draft.json of a trunk's folder. Raises UserError when it is absent or does not describe a draft."""
    path = folder / CONFIG_FILE
    try:
        return DraftConfig(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a trunk's config ({error}); give a folder that `farm train-trunk` wrote"
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file. Raises UserError when it is absent, truncated or corrupt."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: not readable as safetensors ({error}); write or copy the file again"
        ) from error


def split_vocabulary(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """A trunk file's tensors without, and then the draft vocabulary [C] int64 (None: the full one)."""
    weights = {name: value for name, value in tensors.items() if name != VOCABULARY}
    return weights, tensors.get(VOCABULARY)


def build_trunk(config: DraftConfig, state: Mapping[str, Tensor]) -> Trunk:
    """A frozen trunk over the very tensors of `state` (no copy: pages of a shared object store stay shared).

    Raises UserError when a name or shape does not fit the config.
    """
    with torch.device("meta"):
        trunk = Trunk(config)
    weights, trunk.vocabulary_C = split_vocabulary(state)
    _load(trunk, weights, "trunk")
    return trunk.requires_grad_(False)


def build_expert(config: DraftConfig, state: Mapping[str, Tensor]) -> Expert:
    """The private expert of `state`, over its tensors; its width is read from them."""
    width = state["gate_proj.weight"].shape[0] if "gate_proj.weight" in state else config.private_width
    with torch.device("meta"):
        expert = Expert(config.hidden_size, width)
    _load(expert, state, "private expert")
    return expert


def load_expert(config: DraftConfig, path: Path) -> Expert:
    """Private expert of a safetensors file, checked against the trunk's hidden size."""
    return build_expert(config, read_tensors(path))


def load_trunk(folder: Path) -> Trunk:
    """The frozen trunk of a folder that `trunk_files` describes, in float32 on the CPU."""
    return build_trunk(read_config(folder), read_tensors(folder / TRUNK_FILE))


def load_draft(folder: Path, expert: Path | None = None) -> Draft:
    """A folder's trunk with the private expert of a file, or with the base's that lies beside it."""
    trunk = load_trunk(folder)
    return Draft(trunk, load_expert(trunk.config, expert or folder / EXPERT_FILE))


def trunk_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes, so that any in-place write shows."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(module: nn.Module, state: Mapping[str, Any], what: str) -> None:
    try:
        module.load_state_dict(dict(state), strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{what}: its tensors do not fit the draft's config: {error}") from error
