"""Training state as safetensors and JSON: fp32 weights, both Adam moments, the step. Free of the number of workers.

DeepSpeed's own checkpoints are pickles tied to a world size; its `safe_get` / `safe_set` accessors give whole tensors
whatever the ZeRO stage. Without ZeRO they know nothing, and the parameter and the optimizer hold the same values.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_FILE, STEP_FILE = "optimizer.safetensors", "state.json"


def named_weights(engine: Any) -> dict[str, Tensor]:
    """fp32 weights by parameter name, on the CPU. Every rank has to call it."""
    return {
        name: _weight(p).detach().float().cpu().contiguous() for name, p in engine.module.named_parameters()
    }


def save_state(engine: Any, folder: Path, step: int, *, writes: bool) -> None:
    """Writes optimizer.safetensors and state.json. Every rank has to call it; the one that `writes` writes."""
    tensors = {}
    for name, parameter in engine.module.named_parameters():
        tensors[f"weight.{name}"] = _weight(parameter).detach().float().cpu().contiguous()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = _moment(engine, parameter, moment).float().cpu().contiguous()
    if writes:
        save_file(tensors, folder / STATE_FILE)
        (folder / STEP_FILE).write_text(json.dumps({"step": step}))


def load_state(engine: Any, folder: Path) -> int:
    """Restores what `save_state` wrote, at any world size and ZeRO stage; returns the step to go on from."""
    tensors = load_file(folder / STATE_FILE)
    step = int(json.loads((folder / STEP_FILE).read_text())["step"])
    optimizer = _base_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        _set_weight(parameter, tensors[f"weight.{name}"])
        if not hasattr(parameter, "_hp_mapping"):
            optimizer.state[parameter]["step"] = torch.tensor(float(step))
        for moment in MOMENTS:
            _set_moment(engine, parameter, moment, tensors[f"{moment}.{name}"])
    for state in optimizer.state.values():
        state["step"] = torch.tensor(float(step))
    return step


def _base_optimizer(engine: Any) -> Any:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _weight(parameter: Tensor) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    found: Tensor | None = safe_get_full_fp32_param(parameter)
    return parameter if found is None else found


def _moment(engine: Any, parameter: Tensor, moment: str) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    if hasattr(parameter, "_hp_mapping"):
        found: Tensor = safe_get_full_optimizer_state(parameter, moment)
        return found
    state: Tensor = _base_optimizer(engine).state[parameter].get(moment, torch.zeros_like(parameter))
    return state


def _set_weight(parameter: Tensor, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_fp32_param

    if hasattr(parameter, "_hp_mapping"):
        safe_set_full_fp32_param(parameter, value.to(parameter.device))
    with torch.no_grad():
        parameter.copy_(value)


def _set_moment(engine: Any, parameter: Tensor, moment: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state

    if hasattr(parameter, "_hp_mapping"):
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
    else:
        _base_optimizer(engine).state[parameter][moment] = value.to(parameter.device)
