# S unrolled steps
"""Training of a draft, or of a private expert over a frozen trunk, by DeepSpeed on 1..N workers.

Knows nothing of Ray: `torch.distributed` is initialised by the caller, checkpoints leave through `report`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save as safetensors
from torch import Tensor, distributed

from farm.config import TargetSpec, TrainSettings, UserError
from farm.data.features import Sample, read_shards, trainable
from farm.draft.checkpoint import EXPERT_FILE, build_trunk, load_expert, trunk_digest, trunk_files
from farm.draft.config import DraftConfig
from farm.draft.model import Draft, DraftHead, new_draft
from farm.target.load import load_embedding_and_head
from farm.train.batches import Schedule, collate
from farm.train.checkpoint import Progress, load_state, named_weights, save_state
from farm.train.module import DraftLoss, Sums, weighted

CURVE_POINTS = 100

Save = Callable[[Path], None]
Report = Callable[[dict[str, float], Save | None], None]
StepsDone = Callable[[int, int], None]  # steps taken, of all


@dataclass(frozen=True)
class FitTask:
    """One training run: a trunk with the base's expert, or one target's private expert."""

    kind: Literal["trunk", "expert"]
    settings: TrainSettings
    draft: DraftConfig
    target: TargetSpec  # whose embedding and head are used; the base for kind "trunk"
    shards: tuple[str, ...]  # paths of features-*.safetensors, their tokens beside them
    expert: str | None  # path of the expert.safetensors to start from
    vocabulary: tuple[int, ...] | None
    rows: frozenset[int] | None = None  # of the shards, that are trained on; None: all


@dataclass(frozen=True)
class FitResult:
    """`curve` holds (step, loss); the digests are those of the frozen trunk, empty for kind "trunk"."""

    steps: int
    curve: tuple[tuple[int, float], ...]
    trunk_digest_before: str
    trunk_digest_after: str


def fit(
    task: FitTask,
    *,
    trunk: Mapping[str, Tensor] | None,
    resume: Path | None,
    report: Report,
    steps_done: StepsDone | None = None,
) -> FitResult:
    """Trains to the end of the schedule; every rank calls `report` equally often, the last time with the result.

    `report(metrics, save)` is called every `save_every` steps: `save(folder)` has to be called by every rank and is
    written by rank 0. `resume` is such a folder. `steps_done` is called about a hundred times in all. Raises UserError
    when the shards hold nothing to train on, RuntimeError when a frozen trunk changed.
    """
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = _device()
    samples = _trainable(task)
    schedule = Schedule(len(samples), task.settings.batch_rows, task.settings.epochs, task.settings.seed)
    if world > schedule.batch_rows:
        raise UserError(
            f"resources.adapt.workers: {world} workers for {schedule.batch_rows} rows a batch; lower it"
        )
    before = "" if trunk is None else trunk_digest(trunk)
    draft = _draft(task, trunk)
    module = DraftLoss(
        draft.trunk, draft.expert, _head(task, device), task.settings.unroll, train_trunk=trunk is None
    )
    if trunk is not None and device.type != "cpu":
        module.freeze(draft.trunk.to(device))  # a private copy: shared pages are on the CPU
    engine = _initialize(module.to(device), task.settings, world)
    done = Progress() if resume is None else load_state(engine, resume)
    curve, num_steps = list(done.curve), schedule.num_steps
    every = max(1, num_steps // CURVE_POINTS)
    step = done.step

    def save(folder: Path) -> None:
        save_state(engine, folder, Progress(step, tuple(curve)), writes=rank == 0)
        _save_result(task, engine, folder, writes=rank == 0)

    metrics: dict[str, float] = {"loss": curve[-1][1] if curve else math.nan}
    while step < num_steps:
        _set_lr(engine, task.settings, step, num_steps)
        rows = [samples[row] for row in schedule.rows(step, rank, world)]
        batch = collate(rows, prompt_tokens=task.settings.prompt_tokens).to(device)
        log = step % every == 0 or step + 1 == num_steps
        with torch.autocast(device.type, torch.bfloat16, enabled=task.settings.dtype == "bfloat16"):
            sums: Sums = engine(batch, measure=log)
        logged = _train_step(engine, sums, world, log=log)
        if logged is not None:
            metrics = logged
            curve.append((step, metrics["loss"]))
            if steps_done is not None:
                steps_done(step + 1, num_steps)
        step += 1
        if step % task.settings.save_every == 0 and step < num_steps:
            report({"step": float(step), **metrics}, save)
    after = "" if trunk is None else trunk_digest(trunk)
    if before != after:
        raise RuntimeError(
            f"the frozen trunk changed while adapting {task.target.name}: {before[:12]} to {after[:12]}"
        )
    report({"step": float(num_steps), **metrics}, save)
    return FitResult(num_steps, tuple(curve), before, after)


def lr_at(settings: TrainSettings, step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine to zero over the real number of steps."""
    warm = max(1, round(settings.warmup * num_steps))
    if step < warm:
        return settings.lr * (step + 1) / warm
    progress = (step - warm) / max(1, num_steps - warm)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _train_step(engine: Any, sums: Sums, world: int, *, log: bool) -> dict[str, float] | None:
    """Backward and update from one forward's sums; the global means where they are logged."""
    counts_S = sums.counts_S.clone()
    if world > 1:
        distributed.all_reduce(counts_S)
    loss = weighted(sums, counts_S, world)
    engine.backward(loss)
    engine.step()
    if not log:
        return None
    totals = torch.cat((loss.detach()[None] / world, sums.accepted_S / counts_S.clamp(min=1)))
    if world > 1:
        distributed.all_reduce(totals)
    mean, *accepted = totals.tolist()
    return {"loss": mean, **{f"acceptance_{i + 1}": value for i, value in enumerate(accepted)}}


def _trainable(task: FitTask) -> list[Sample]:
    read = read_shards([Path(path) for path in task.shards], task.rows)
    samples = [sample for sample in read if trainable(len(sample.tokens_T) - sample.num_prompt_tokens)]
    if not samples:
        raise UserError(f"{task.target.name}: no answer is long enough to train on; see its finish reasons")
    return samples


def _draft(task: FitTask, trunk: Mapping[str, Tensor] | None) -> Draft:
    if trunk is None:
        return new_draft(task.draft, task.settings.seed)
    if task.expert is None:
        return Draft(build_trunk(task.draft, trunk), new_draft(task.draft, task.settings.seed).expert)
    return Draft(build_trunk(task.draft, trunk), load_expert(task.draft, Path(task.expert)))


def _head(task: FitTask, device: torch.device) -> DraftHead:
    embedding, weight = (tensor.to(device) for tensor in load_embedding_and_head(task.target))
    vocabulary = None if task.vocabulary is None else torch.tensor(task.vocabulary, device=device)
    return DraftHead.of(embedding, weight, vocabulary)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _initialize(module: DraftLoss, settings: TrainSettings, world: int) -> Any:
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    if not torch.cuda.is_available() and hasattr(deepspeed.ops, "__compatible_ops__"):
        # Its first use compiles C++ for over a minute; gloo alone serves small experts.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0)
    config = {
        "train_micro_batch_size_per_gpu": max(1, settings.batch_rows // world),
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": settings.zero_stage},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine


def _set_lr(engine: Any, settings: TrainSettings, step: int, num_steps: int) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr_at(settings, step, num_steps)


def _save_result(task: FitTask, engine: Any, folder: Path, *, writes: bool) -> None:
    weights = named_weights(engine)
    if not writes:
        return
    expert, trunk = _below(weights, "expert."), _below(weights, "trunk.")
    if task.kind == "expert":
        files = {EXPERT_FILE: safetensors(expert)}
    else:
        vocabulary = None if task.vocabulary is None else torch.tensor(task.vocabulary)
        files = trunk_files(task.draft, trunk, expert, vocabulary)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
