"""A family in memory: two full checkpoints of one shape, LoRAs of the first, drafts over one trunk; fp64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from farm.decode.engine import Route
from farm.draft.expert import Expert
from farm.draft.model import Draft
from farm.layers.lora import Part
from farm.target.forward import TargetForward
from farm.target.lora import open_lora
from farm.target.weights import read_weights
from tests.farm.models import random_delta, tiny_model, tiny_pair

NO_STOP: frozenset[int] = frozenset()
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def write_lora(folder: Path, model: Any, *, rank: int, seed: int) -> Path:
    """A PEFT adapter of random factors, large enough to change what is decoded."""
    folder.mkdir(parents=True)
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, weight in model.state_dict().items():
        if any(name.endswith(f"{projection}.weight") for projection in PROJECTIONS):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            y, x = weight.shape
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, x, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(y, rank, generator=generator) * 0.3
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def expert_like(draft: Draft, width: int, seed: int, ranks: dict[Part, int] | None = None) -> Draft:
    """Another private expert over the same trunk; with `ranks`, low-rank changes to it too."""
    torch.manual_seed(seed)
    expert = Expert(draft.config.hidden_size, width).double().requires_grad_(False)
    delta = None if ranks is None else random_delta(draft.config, ranks, seed).double()
    return Draft(draft.trunk, expert, delta)


def family(folder: Path) -> tuple[list[Route], dict[str, Route]]:
    """Routes as an engine hosts them together, and for each target a route of its own with the LoRA merged."""
    models = [tiny_model(seed=seed).double() for seed in (0, 1)]
    forwards = [TargetForward.of(model) for model in models]
    draft = tiny_pair()[1].double()
    mixed = [
        Route(forwards[0], NO_STOP, expert_like(draft, 64, 10, {"fc": 3}), target="base"),
        Route(forwards[1], frozenset({3}), expert_like(draft, 64, 11), target="full"),
        Route(forwards[0], NO_STOP, None, target="plain"),
    ]
    alone = {route.target: route for route in mixed}
    checkpoint = folder / "checkpoint"
    models[0].save_pretrained(checkpoint)
    ranks: list[dict[Part, int] | None] = [None, {"fc": 2, "qkv": 4, "out": 1}]
    for index, rank in enumerate((2, 4)):
        name = f"lora{index}"
        adapter = write_lora(folder / name, models[0], rank=rank, seed=index)
        own = expert_like(draft, 32 + 16 * index, 20 + index, ranks[index])
        mixed.append(Route(forwards[0], NO_STOP, own, open_lora(adapter, forwards[0]), name))
        weights = read_weights(checkpoint, adapter, torch.float64)
        assert weights is not None
        alone[name] = Route(TargetForward(models[0].config, weights), NO_STOP, own, target=name)
    return mixed, alone
