"""A checkpoint's tensors by name, and a LoRA merged into them, without building the model.

Importing a model's code and PEFT's costs more seconds than loading a small target; files say all that is needed.
What they do not say plainly (GGUF, an unusual LoRA) goes through the libraries instead: None here means "ask them".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from farm.config import Refused

LORA_PREFIX = "base_model.model."
INVOCATION = "alora_invocation_tokens"  # of an adapter that is off until they are said
# Ways to begin a LoRA that leave the base's weights as they are; others (PiSSA, OLoRA, LoftQ) take a part out of them.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
# Fields of a PEFT config that say which weights are adapted, how training began, or what is read here; any other that
# is set may change what is computed, those of PEFT's next version among them.
PLAIN_FIELDS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "runtime_config", "megatron_core", "qalora_group_size",
}  # fmt: skip


def read_weights(
    folder: Path, lora: Path | None, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor] | None:
    """Every tensor of a folder's safetensors files with the LoRA's deltas added; None if that is not plain LoRA.

    None as well when the LoRA adapts a weight that the files do not have.
    Each is on `device` before the next is read: on `meta`, which keeps shapes, one is in memory at a time.
    Raises SafetensorError or OSError when a file is truncated, corrupt or missing, Refused as `weight_files` does,
    ValueError as `read_factors` does.
    """
    factors = {} if lora is None else read_factors(lora)
    if factors is None:
        return None
    files = weight_files(folder)
    if factors and not factors.keys() <= _names(files):
        return None
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                weights[name] = _merged(tensors.get_tensor(name), factors.get(name)).to(dtype).to(device)
    return weights


def _names(files: Sequence[Path]) -> set[str]:
    """Of the files' tensors, from their headers."""
    found: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            found.update(tensors.keys())
    return found


def _merged(weight_YX: Tensor, pair: LoraFactors | None) -> Tensor:
    return weight_YX if pair is None else weight_YX.float() + pair.up_YR @ pair.down_RX


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make a checkpoint, as `transformers` finds them; all where it would find none.

    Files that an earlier download left beside them are none of them. One that the index names may be missing.
    Raises Refused for an index that cannot be read.
    """
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            return [
                folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
            ]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise Refused(f"{index} cannot be read ({error}); copy the checkpoint again") from error
    return sorted(folder.glob("*.safetensors"))


def adapter_files(folder: Path) -> list[Path]:
    """The one safetensors file that PEFT reads of an adapter's folder; none where it is not there."""
    return [file for file in [folder / "adapter_model.safetensors"] if file.is_file()]


def adapter_names(folder: Path) -> set[str]:
    """Names of an adapter's tensors. Raises SafetensorError or OSError for a file that cannot be read."""
    return _names(adapter_files(folder))


@dataclass(frozen=True)
class LoraFactors:
    """A and alpha / r B of one adapted weight (LoRA, 2106.09685), fp32."""

    down_RX: Tensor
    up_YR: Tensor


def read_factors(lora: Path) -> dict[str, LoraFactors] | None:
    """The factors of every adapted weight, by the weight's name; None if the adapter has more than these.

    Raises ValueError for an adapter without tensors or of another rank than its config's, KeyError for half a pair.
    """
    config = json.loads((lora / "adapter_config.json").read_text())
    if not is_plain(config):
        return None
    tensors: dict[str, Tensor] = {}
    for file in adapter_files(lora):
        tensors |= load_file(file)
    if not tensors:
        raise ValueError(f"{lora} holds no adapted weight")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    factors = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        b = tensors[name.replace("lora_A", "lora_B")]
        if len(a) != config["r"]:
            raise ValueError(
                f"{name} has rank {len(a)}, by {lora / 'adapter_config.json'} it would be {config['r']}"
            )
        weight = name.removeprefix(LORA_PREFIX).replace(".lora_A.weight", ".weight")
        factors[weight] = LoraFactors(a.float(), scale * b.float())
    return factors if 2 * len(factors) == len(tensors) else None


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a PEFT config says W + alpha / r B A and nothing else."""
    return (
        config.get("peft_type") == "LORA"
        and config.get("bias", "none") == "none"
        and config.get("init_lora_weights", True) in PLAIN_INITS
        and not any(value for field, value in config.items() if field not in PLAIN_FIELDS)
    )
