# S unrolled steps
"""Training of a draft, or of what a tier trains over a frozen trunk, by DeepSpeed on 1..N workers.

Knows nothing of Ray: `torch.distributed` is initialised by the caller, checkpoints leave through `report`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as safetensors
from torch import Tensor, distributed

from farm.config import UserError
from farm.data.features import Sample, local_shards, read_shards
from farm.decode.regenerate import Recapture
from farm.draft.checkpoint import (
    EXPERT_FILE,
    adapter_state,
    build_trunk,
    load_expert,
    trunk_digest,
    trunk_files,
)
from farm.draft.config import DraftConfig
from farm.draft.model import DraftHead, new_draft
from farm.sections import AdaptSettings, Dtype, TargetSpec, TrainSettings
from farm.store import local_copy
from farm.target.load import load_embedding_and_head, resolve_dtype
from farm.train.cached import Positions, bytes_of, cache_positions
from farm.train.course import Course, rows_at_once, split_held_out
from farm.train.filtering import ReferenceLosses, reference_losses
from farm.train.tiers import TierShape, TrainedDraft, trained_draft
from farm.train.training import Clock, StepsDone, Training

Save = Callable[[Path], None]
Report = Callable[[dict[str, float], Save | None], None]


@dataclass(frozen=True)
class FitTask:
    """One training run: a trunk with the base's expert, or what a tier trains for one target."""

    kind: Literal["trunk", "expert"]
    settings: TrainSettings
    draft: DraftConfig
    target: TargetSpec  # whose embedding and head are used; the base for kind "trunk"
    shards: tuple[str, ...]  # locations of features-*.safetensors, their tokens beside them
    expert: str | None  # location of the expert.safetensors to start from
    vocabulary: tuple[int, ...] | None
    rows: frozenset[int] | None = None  # of the shards, that are trained on; None: all
    dtype: Dtype = "auto"  # that the target captures features in which were not kept


@dataclass(frozen=True)
class Seconds:
    """Where a run's time went; saving checkpoints and starting processes are not in it."""

    caching: float = 0.0
    reference: float = 0.0
    steps: float = 0.0


@dataclass(frozen=True)
class FitResult:
    """What a run came to; the digests are those of the frozen trunk, empty for kind "trunk"."""

    steps: int
    curve: tuple[tuple[int, float], ...]  # step, loss
    trunk_digest_before: str
    trunk_digest_after: str
    held_out: tuple[tuple[int, float], ...] = ()  # step, expected tau on the rows of an early stop
    seconds: Seconds = Seconds()
    positions: int = 0  # first-step positions of all steps that were taken, on all ranks
    flops: float = 0.0  # of this rank; counted at a few steps of each form
    trained_bytes: int = 0  # of the trained tensors
    best_step: int | None = None  # whose weights the result has; None: the last's, nothing was measured


def fit(
    task: FitTask,
    *,
    trunk: Mapping[str, Tensor] | None,
    resume: Path | None,
    report: Report,
    steps_done: StepsDone | None = None,
) -> FitResult:
    """Trains to the end of the schedule; every rank calls `report` equally often, the last time with the result.

    Under an early stop to where it ends, and the result has the weights of the best measurement.

    `report(metrics, save)` is called every `save_every` steps: `save(folder)` has to be called by every rank and is
    written by rank 0. `resume` is such a folder. `steps_done` is called about a hundred times in all. Raises UserError
    when the shards hold nothing to train on, FloatingPointError when the loss is not finite, RuntimeError when a frozen
    trunk changed.
    """
    task, world = _with_dtype(task), distributed.get_world_size()
    recapture = Recapture.of(task.target, task.dtype)
    samples = read_shards(local_shards(task.shards), task.rows, recapture)
    del recapture  # and the target with it
    numbers, held_out = split_held_out(_trainable(task, samples), task.settings)
    task = _within_tokens(task, [samples[number] for number in numbers])
    settings = task.settings
    if world > min(settings.batch_rows, len(numbers)):
        raise UserError(
            f"resources.adapt.workers: {world} workers for {min(settings.batch_rows, len(numbers))} rows "
            "a batch; lower it"
        )
    before = "" if trunk is None else trunk_digest(trunk)
    head, trained = _head(task, _device()), _trained(task, trunk, _device())
    clock = Clock()
    positions = _cached(task, trained, head, samples, numbers)
    caching = clock.lap()
    course = Course(samples, numbers, settings, positions, world)
    reference = _reference(task, trunk, head, course, resume)
    spent_on_reference = clock.lap()
    training = Training(task.target.name, settings, course, trained, head, reference)
    if resume is not None:
        training.load(resume)

    def save(folder: Path) -> None:
        training.save(folder)
        if distributed.get_rank() == 0:
            if reference is not None:
                reference.save(folder)
            _save_result(task, trained, folder)

    def checkpoint(metrics: dict[str, float]) -> None:
        report(metrics, save)

    training.run(checkpoint, steps_done, held_out)
    after = "" if trunk is None else trunk_digest(trunk)
    if before != after:
        raise RuntimeError(
            f"the frozen trunk changed while adapting {task.target.name}: {before[:12]} to {after[:12]}"
        )
    report({"step": float(training.step), "seconds": training.seconds, **training.metrics}, save)
    return FitResult(
        training.step, tuple(training.curve), before, after, tuple(training.held_out),
        Seconds(caching, spent_on_reference, training.seconds),
        training.positions, training.flops, trained.num_bytes,
        None if training.best is None else training.best.step,
    )  # fmt: skip


def _with_dtype(task: FitTask) -> FitTask:
    """With the dtype of products that is meant on this process's device."""
    dtype = resolve_dtype(task.settings.dtype, _device().type)
    return replace(task, settings=task.settings.model_copy(update={"dtype": dtype}))


def _within_tokens(task: FitTask, samples: list[Sample]) -> FitTask:
    """With the whole epochs, at least one, that come nearest to the tokens that are to be trained on."""
    settings = task.settings
    if not isinstance(settings, AdaptSettings) or settings.tokens is None:
        return task
    each = sum(sample.num_said for sample in samples)
    epochs = max(1, round(settings.tokens / each))
    return replace(task, settings=settings.model_copy(update={"epochs": epochs}))


def _trainable(task: FitTask, samples: list[Sample]) -> list[int]:
    found = [number for number, sample in enumerate(samples) if sample.trainable]
    if not found:
        raise UserError(f"{task.target.name}: no answer is long enough to train on; see its finish reasons")
    return found


def _trained(task: FitTask, trunk: Mapping[str, Tensor] | None, device: torch.device) -> TrainedDraft:
    """The draft at its start; a frozen trunk keeps the tensors it was given where the device allows."""
    settings = task.settings
    if trunk is None:
        fresh = new_draft(task.draft, settings.seed).to(device)
        return TrainedDraft(fresh.trunk, fresh.expert, owned=fresh.trunk)
    frozen = build_trunk(task.draft, trunk).to(device)
    base = None if task.expert is None else load_expert(task.draft, local_copy(task.expert)).to(device)
    shape = TierShape("expert", 1, None, "base" if base is not None else "random")
    if isinstance(settings, AdaptSettings):
        shape = TierShape(settings.tier, settings.rank, settings.width, settings.init)
    return trained_draft(frozen, base, shape, settings.seed)


def _cached(
    task: FitTask, trained: TrainedDraft, head: DraftHead, samples: list[Sample], numbers: list[int]
) -> Positions | None:
    settings = task.settings
    if not isinstance(settings, AdaptSettings) or settings.form == "unrolled":
        return None
    dtype: torch.dtype = getattr(torch, settings.dtype)
    needed = bytes_of([samples[number] for number in numbers], dtype)
    if needed > settings.cached_bytes:
        raise UserError(
            f"{task.target.name}: form {settings.form} would cache {needed / 2**30:.1f} GiB; raise "
            "adapt.cached_bytes, select fewer rows, or use form unrolled"
        )
    return cache_positions(
        trained.trunk, head, [(number, samples[number]) for number in numbers],
        batch_rows=rows_at_once(settings), prompt_tokens=settings.prompt_tokens, dtype=dtype,
    )  # fmt: skip


def _reference(
    task: FitTask,
    trunk: Mapping[str, Tensor] | None,
    head: DraftHead,
    course: Course,
    resume: Path | None,
) -> ReferenceLosses | None:
    """Losses of a draft of the same start, distilled without a filter; read back by a run that is resumed."""
    adaspec = task.settings.adaspec
    if adaspec is None:
        return None
    if resume is not None:
        return ReferenceLosses.load(resume, _device())
    settings = task.settings.model_copy(
        update={"adaspec": None, "early_stop": None, "loss": "kl", "epochs": adaspec.reference_epochs}
    )
    trained = _trained(task, trunk, _device())
    training = Training(task.target.name, settings, course.with_settings(settings), trained, head, None)
    training.run(None, None, [])
    return reference_losses(
        training.module, training.whole(course.numbers),
        num_samples=course.num_samples, length=course.longest, world=distributed.get_world_size(),
    )  # fmt: skip


def _head(task: FitTask, device: torch.device) -> DraftHead:
    embedding, weight = (tensor.to(device) for tensor in load_embedding_and_head(task.target))
    vocabulary = None if task.vocabulary is None else torch.tensor(task.vocabulary, device=device)
    return DraftHead.of(embedding, weight, vocabulary)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _save_result(task: FitTask, trained: TrainedDraft, folder: Path) -> None:
    """The folded draft: what is private alone where the trunk is as it was, else both."""
    draft = trained.folded()
    private, trunk = (
        {name: value.float().cpu().contiguous() for name, value in part.items()}
        for part in (adapter_state(draft.expert, draft.delta), draft.trunk.state_dict())
    )
    if trained.owned is None:
        files = {EXPERT_FILE: safetensors(private)}
    else:
        vocabulary = None if task.vocabulary is None else torch.tensor(task.vocabulary)
        files = trunk_files(task.draft, trunk, private, vocabulary)
    for name, data in files.items():
        (folder / name).write_bytes(data)
