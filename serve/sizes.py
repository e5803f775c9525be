"""How many bytes a target takes in a replica, from the headers of its files: no weight is loaded."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from farm.config import Refused, UserError
from farm.decode import drafts, routes
from farm.decode.drafting import buffered
from farm.draft.checkpoint import DELTA, EXPERT_FILE, TRUNK_FILE, VOCABULARY, read_config
from farm.draft.config import DraftConfig
from farm.sections import ServeSettings, TargetSpec
from farm.store import local_copy
from farm.target.load import check_adapter, check_folder
from farm.target.weights import adapter_files, is_plain, weight_files
from serve.lengths import longest, num_drafted
from serve.placement import Need

# Of a replica beside weights and caches: Python, torch, transformers, the tensors of a step. On a CPU 438 MiB were
# seen with SmolLM2-135M and 548 MiB with eleven targets of the zoo; large batches of large models take more.
PROCESS_BYTES = 600 * 2**20
HOSTED_VERSIONS = 2  # of a target: live and canary
EXPERT_FORMS = 3  # as loaded, fused for a batch of its own, flat for a mixed one
TRUNK_FORMS = 2  # as loaded, fused
DELTA_FORMS = 2  # of what a target changes in the trunk: as loaded, flat for a mixed batch
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class DraftSizes:
    """What the drafts of a store take, in numbers of weights."""

    config: DraftConfig
    trunk: int
    expert: int  # the base's; adapters are taken to be as wide
    vocabulary: int | None  # tokens that drafts propose; None: all

    @classmethod
    def of(cls, folder: Path) -> DraftSizes:
        """Of a trunk's folder. Raises UserError when it cannot be read."""
        trunk, expert = read_header(folder / TRUNK_FILE), read_header(folder / EXPERT_FILE)
        kept = trunk.pop(VOCABULARY, None)
        return cls(read_config(folder), _numel(trunk), _numel(expert), kept[0] if kept else None)


@dataclass(frozen=True)
class Sizes:
    """Measures targets for replicas that decode with these settings; `draft` None: nothing is drafted."""

    settings: ServeSettings
    dtype: str
    device: str
    draft: DraftSizes | None
    deltas: Mapping[str, int] = field(default_factory=dict)  # weights that live adapters change the trunk by

    @property
    def item_bytes(self) -> int:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize

    @property
    def shared_bytes(self) -> int:
        """Of the process, and of the trunk with the base's private expert."""
        if self.draft is None:
            return PROCESS_BYTES
        trunks = 1 + (drafts.KEPT_TRUNKS if any(self.deltas.values()) else 0)
        weights = trunks * TRUNK_FORMS * self.draft.trunk + EXPERT_FORMS * self.draft.expert
        return PROCESS_BYTES + weights * self.item_bytes

    def need(self, spec: TargetSpec, *, beside: bool) -> Need:
        """A target's; `beside`: other targets have its checkpoint, a LoRA lies beside it. Refused if unreadable."""
        try:
            config, weights = _open(spec.name, spec.model)
            lora = 0 if spec.lora is None else _lora_weights(spec, local_copy(spec.lora))
        except (OSError, ValueError, KeyError, ImportError, UserError) as error:
            raise Refused(f"{spec.name}: cannot be measured: {error}") from error
        merged = spec.lora is not None and (not beside or lora == 0)
        expert = self.draft.expert * self.item_bytes if self.draft else 0
        delta = self.deltas.get(spec.name, 0) * self.item_bytes if self.draft else 0
        lora_bytes = 0 if merged else lora * self.item_bytes
        return Need(
            target=spec.name,
            checkpoint=f"{spec.model} + {spec.lora}" if merged else spec.model,
            checkpoint_bytes=self._checkpoint_bytes(config, weights),
            own_bytes=lora_bytes + HOSTED_VERSIONS * (EXPERT_FORMS * expert + DELTA_FORMS * delta),
            shape=_shape(config),
            cache_bytes=self._cache_bytes(config),
            mixture_bytes=self._mixture_bytes(lora_bytes, expert + delta),
        )

    def _checkpoint_bytes(self, config: Any, weights: int) -> int:
        head = config.vocab_size * config.hidden_size * self.item_bytes
        laid_out = head if self.device == "cpu" else 0  # anew, beside the plain one
        kept = self.draft.vocabulary if self.draft else None
        pruned = 0 if kept is None else kept * config.hidden_size * self.item_bytes
        return weights * self.item_bytes + laid_out + pruned

    def _cache_bytes(self, config: Any) -> int:
        """Of `farm.decode.runner.Runner`'s slots."""
        layers, heads, head_dim, positions, hidden, _ = _shape(config)
        slots = self.settings.num_slots
        length = longest(self.settings, positions, drafts=self.draft is not None)
        capacity = length + num_drafted(self.settings) + 1
        found = layers * slots * 2 * heads * capacity * head_dim * self.item_bytes
        if self.draft is None:
            return found
        entries = 2 * self.draft.config.num_kv_heads * self.draft.config.head_dim
        # Of each position an entry of the draft's cache, and the target's hidden state until it is read.
        return found + slots * buffered(capacity) * (entries + hidden) * self.item_bytes

    def _mixture_bytes(self, lora_bytes: int, adapter_bytes: int) -> int:
        """Of the stacks that an engine keeps for its last batches, at most: a LoRA and an adapter for every slot."""
        loras, adapters = routes.KEPT_STACKS * lora_bytes, drafts.KEPT_STACKS * adapter_bytes
        return self.settings.num_slots * (loras + adapters)


def delta_weights(file: Path) -> int:
    """Numbers of the changes to the trunk in an adapter's file. Raises UserError when it cannot be read."""
    return _numel({name: shape for name, shape in read_header(file).items() if name.startswith(DELTA)})


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's tensors by name. Raises UserError when it is no such file.

    Format: 8 bytes little-endian length, then that much JSON (https://github.com/huggingface/safetensors).
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError(f"its header claims {length} bytes")
            header = json.loads(file.read(length))
        return {name: tuple(field["shape"]) for name, field in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path}: not readable as safetensors ({error}); copy the file again") from error


def _open(name: str, model: str) -> tuple[Any, int]:
    """A checkpoint's `transformers` config and its number of weights."""
    from transformers import AutoConfig

    path = local_copy(model)
    if path.suffix == ".gguf":
        from gguf import GGUFReader

        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        return config, sum(int(tensor.n_elements) for tensor in GGUFReader(path).tensors)
    check_folder(name, path)
    return AutoConfig.from_pretrained(path, trust_remote_code=False), _folder_weights(path)


def _lora_weights(spec: TargetSpec, folder: Path) -> int:
    """Numbers of a LoRA as it lies beside a forward; 0 if it has to be merged.

    Up maps of fused projections are block diagonal: three of them take up to three times their own weights.
    """
    check_adapter(spec.name, folder)
    if not is_plain(json.loads((folder / "adapter_config.json").read_text())):
        return 0
    shapes = [shape for file in adapter_files(folder) for shape in read_header(file).items()]
    fused = sum(math.prod(shape) * (3 if _is_fused_up(name) else 1) for name, shape in shapes)
    return fused


def _is_fused_up(name: str) -> bool:
    return "lora_B" in name and any(f"{part}_proj" in name for part in ("q", "k", "v", "gate", "up"))


def _folder_weights(folder: Path) -> int:
    return sum(_numel(read_header(file)) for file in weight_files(folder))


def _numel(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _shape(config: Any) -> tuple[int, int, int, int, int, int]:
    """As `farm.decode.routes.shape`: targets that agree in it share the slots of one engine."""
    heads = config.num_attention_heads
    return (
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
        config.max_position_embeddings,
        config.hidden_size,
        config.vocab_size,
    )
