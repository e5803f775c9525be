"""Trunk and adapters (a private expert, perhaps changes to the trunk) as safetensors files, loaded strictly by name."""

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
from farm.draft.delta import DELTA_PARTS, TrunkDelta
from farm.draft.expert import Expert
from farm.draft.model import Draft
from farm.draft.trunk import Trunk

CONFIG_FILE, TRUNK_FILE, EXPERT_FILE = "draft.json", "trunk.safetensors", "expert.safetensors"
VOCABULARY = "draft_vocabulary"
DELTA = "trunk_delta."  # begins the names of what a target changes in the trunk


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


def adapter_state(expert: nn.Module, delta: nn.Module | None) -> dict[str, Tensor]:
    """Everything that is private to a target, by name, as its file holds it."""
    state = dict(expert.state_dict())
    if delta is not None:
        state |= {f"{DELTA}{name}": value for name, value in delta.state_dict().items()}
    return state


def load_adapter(config: DraftConfig, path: Path) -> tuple[Expert, TrunkDelta | None]:
    """The private expert of a file, and what the target changes in the trunk: None where the file has no such tensors.

    Raises UserError when a name or a shape does not fit the config.
    """
    state = read_tensors(path)
    changes = {name.removeprefix(DELTA): value for name, value in state.items() if name.startswith(DELTA)}
    expert = build_expert(config, {n: value for n, value in state.items() if not n.startswith(DELTA)})
    if not changes:
        return expert, None
    ranks = {part: changes[f"{part}.a_RX"].shape[0] for part in DELTA_PARTS if f"{part}.a_RX" in changes}
    with torch.device("meta"):
        delta = TrunkDelta.empty(config, ranks)
    _load(delta, changes, "trunk delta")
    return expert, delta


def load_trunk(folder: Path) -> Trunk:
    """The frozen trunk of a folder that `trunk_files` describes, in float32 on the CPU."""
    return build_trunk(read_config(folder), read_tensors(folder / TRUNK_FILE))


def load_draft(folder: Path, expert: Path | None = None) -> Draft:
    """A folder's trunk with the adapter of a file, or with the base's private expert that lies beside it."""
    trunk = load_trunk(folder)
    return Draft(trunk, *load_adapter(trunk.config, expert or folder / EXPERT_FILE))


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
