"""Training state as safetensors and JSON: fp32 weights, the best so far, both Adam moments, the step.

It is free of the number of workers.

DeepSpeed's own checkpoints are pickles tied to a world size; its `safe_get` / `safe_set` accessors give whole tensors
whatever the ZeRO stage. Without ZeRO they know nothing, and the parameter and the optimizer hold the same values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from farm.train.held_out import Best

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_FILE, STEP_FILE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Progress:
    """How far a run is: steps taken, and so far the loss and what an early stop measured, as (step, value).

    `best` is None where nothing was measured yet.
    """

    step: int = 0
    curve: tuple[tuple[int, float], ...] = ()
    held_out: tuple[tuple[int, float], ...] = ()
    best: Best | None = None


def save_state(engine: Any, folder: Path, progress: Progress, *, writes: bool) -> None:
    """Writes optimizer.safetensors and state.json. Every rank has to call it; the one that `writes` writes."""
    best = progress.best
    tensors = {} if best is None else {f"best.{name}": weight for name, weight in best.weights.items()}
    state = {
        "step": progress.step, "curve": progress.curve, "held_out": progress.held_out,
        "best": None if best is None else (best.step, best.tau),
    }  # fmt: skip
    for name, parameter in engine.module.named_parameters():
        tensors[f"weight.{name}"] = _weight(parameter).detach().float().cpu().contiguous()
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = _moment(engine, parameter, moment).float().cpu().contiguous()
    if writes:
        save_file(tensors, folder / STATE_FILE)
        (folder / STEP_FILE).write_text(json.dumps(state))


def load_state(engine: Any, folder: Path) -> Progress:
    """Restores what `save_state` wrote, at any world size and ZeRO stage."""
    _create_optimizer_state(engine)
    tensors = load_file(folder / STATE_FILE)
    state = json.loads((folder / STEP_FILE).read_text())
    step = int(state["step"])
    optimizer = _base_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        _set_weight(parameter, tensors[f"weight.{name}"])
        for moment in MOMENTS:
            _set_moment(engine, parameter, moment, tensors[f"{moment}.{name}"])
    for moments in optimizer.state.values():
        moments["step"].fill_(float(step))  # a fused AdamW wants it where the parameter is
    return Progress(step, _pairs(state["curve"]), _pairs(state["held_out"]), _best(state, tensors))


def set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Whole fp32 weights by parameter name; every rank has to call it, with the same ones."""
    for name, parameter in module.named_parameters():
        _set_weight(parameter, weights[name])


def _best(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Best | None:
    if state.get("best") is None:
        return None
    ((step, tau),) = _pairs([state["best"]])
    prefix = "best."
    return Best(step, tau, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})


def _pairs(values: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(step), float(value)) for step, value in values)


def _create_optimizer_state(engine: Any) -> None:
    """Takes one step of zero gradients at a rate of zero: ZeRO has no moments to set before its first step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(torch.stack([p.sum() for p in engine.module.parameters()]).sum() * 0.0)
        engine.step()


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
