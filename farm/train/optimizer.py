"""DeepSpeed around a module, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import distributed, nn

from farm.sections import TrainSettings


def initialize(module: nn.Module, settings: TrainSettings, num_micro: int, rows: int) -> Any:
    """A DeepSpeed engine that steps once after `num_micro` backward passes of `rows` rows each."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if not torch.cuda.is_available() and hasattr(deepspeed.ops, "__compatible_ops__"):
        # Its first use compiles C++ for over a minute; gloo alone serves small experts.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    config = {
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": num_micro,
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings.zero_stage},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    if settings.zero_stage == 0 and distributed.get_world_size() == 1:
        # It would copy every gradient into one buffer and back; ZeRO's own reduction also moves gradients, so it stays.
        engine.enable_backward_allreduce = False
    return engine


def lr_at(settings: TrainSettings, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine to zero over the real number of steps."""
    warm = max(1, round(settings.warmup * num_steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    progress = (step - warm) / max(1, num_steps - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_lr(engine: Any, settings: TrainSettings, step: int, num_steps: int) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr_at(settings, step, num_steps)
