# X inputs, Y outputs, R rank columns
"""A PEFT adapter as deltas over its base's forward, so that LoRA targets of one base share the base in memory."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from farm.config import Refused
from farm.data.chat import read_template
from farm.layers.lora import Lora, Part
from farm.sections import TargetSpec
from farm.store import local_copy
from farm.target.forward import TargetForward
from farm.target.load import LoadedTarget, check_adapter, stop_ids
from farm.target.model import TargetModel
from farm.target.weights import LoraFactors, read_factors

# The projections that are fused in each product of a layer (farm/target/forward.py).
PROJECTIONS: dict[Part, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def open_beside(spec: TargetSpec, base: LoadedTarget) -> LoadedTarget | None:
    """A LoRA target over the forward of `base`, its checkpoint without the LoRA; None if it has to be merged.

    Raises Refused, naming the reason, when the adapter cannot be read.
    """
    assert spec.lora is not None
    folder = local_copy(spec.lora)
    check_adapter(spec.name, folder)
    try:
        lora = open_lora(folder, base.forward)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise Refused(
            f"{spec.name}: {spec.lora} cannot be loaded ({type(error).__name__}: {error})"
        ) from error
    if lora is None:
        return None
    return replace(
        base, name=spec.name, lora=lora, chat_template=read_template(spec.chat_template),
        stop_ids=stop_ids(spec, base.config, base.tokenizer), num_bytes=lora.num_bytes,
    )  # fmt: skip


def open_lora(folder: Path, base: TargetModel) -> Lora | None:
    """A PEFT adapter's deltas for the base's forward; None if it changes more than the products of the layers.

    None as well for a base whose layers are not fused here. Raises SafetensorError or OSError when a file cannot be
    read, ValueError when the adapter belongs to a base of other sizes.
    """
    if not isinstance(base, TargetForward):
        return None
    factors = read_factors(folder)
    if factors is None:
        return None
    projections = list(itertools.chain.from_iterable(PROJECTIONS.values()))
    names = {f"model.layers.{i}.{name}.weight" for i in range(len(base.layers)) for name in projections}
    if not factors.keys() <= names:
        return None
    found: dict[tuple[int, Part], tuple[Tensor, Tensor]] = {}
    for index in range(len(base.layers)):
        for part, pair in _layer(factors, index, base).items():
            found[index, part] = pair
    return Lora.of(found) if found else None


def _layer(
    factors: Mapping[str, LoraFactors], index: int, base: TargetForward
) -> dict[Part, tuple[Tensor, Tensor]]:
    sizes, found = _sizes(base, index), dict[Part, tuple[Tensor, Tensor]]()
    for part, projections in PROJECTIONS.items():
        named = {name: f"model.layers.{index}.{name}.weight" for name in projections}
        pairs = [factors.get(full) for full in named.values()]
        if not any(pairs):
            continue
        blocks = []
        for (name, full), pair in zip(named.items(), pairs, strict=True):
            if pair is not None:
                _check_size(full, pair, sizes[name])
            blocks.append(torch.zeros(0, sizes[name][0]) if pair is None else pair.up_YR.t())
        down_XR = torch.cat([pair.down_RX for pair in pairs if pair is not None]).t()
        up_RY = torch.block_diag(*blocks)
        like = {"dtype": base.dtype, "device": base.device}
        found[part] = down_XR.to(**like), up_RY.to(**like)
    return found


def _sizes(base: TargetForward, index: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of a layer's projections."""
    h, n, g = base.hidden_size, base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim
    f = base.layers[index].gate_up.gate_up.num_outputs // 2
    of_part: dict[Part, tuple[tuple[int, int], ...]] = {
        "qkv": ((n, h), (g, h), (g, h)), "out": ((h, n),), "gate_up": ((f, h), (f, h)), "down": ((h, f),),
    }  # fmt: skip
    pairs = ((PROJECTIONS[part], sizes) for part, sizes in of_part.items())
    return {name: size for names, sizes in pairs for name, size in zip(names, sizes, strict=True)}


def _check_size(name: str, pair: LoraFactors, size: tuple[int, int]) -> None:
    """Raises ValueError for factors of another size than the weight's [Y, X]: kernels would read past their end."""
    a, b = tuple(pair.down_RX.shape), tuple(pair.up_YR.shape)
    rank, (y, x) = a[0], size
    if (a, b) != ((rank, x), (y, rank)):
        raise ValueError(f"{name}: lora_A {list(a)} and lora_B {list(b)} do not fit the base's {[y, x]}")
