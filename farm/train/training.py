# S unrolled steps
"""The steps of a run: forward, which positions count, backward, update; the curve, an early stop, its state on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.flop_counter import FlopCounterMode

from farm.draft.model import DraftHead
from farm.sections import TrainSettings
from farm.train.adaspec import keep_at
from farm.train.batches import Batch
from farm.train.cached import Positions
from farm.train.checkpoint import Progress, load_state, save_state, set_weights
from farm.train.course import Course
from farm.train.filtering import ReferenceLosses, behind, learned
from farm.train.held_out import Best, better, expected_tau, stops
from farm.train.module import DraftLoss, Learned, StepLosses, mean_loss
from farm.train.optimizer import initialize, set_lr
from farm.train.tiers import TrainedDraft

CURVE_POINTS = 100
FLOP_SAMPLES = 4  # steps of each form at which operations are counted

StepsDone = Callable[[int, int], None]  # steps taken, of all
Checkpoint = Callable[[dict[str, float]], None]


class Clock:
    """Seconds since it was last asked."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


class Training:
    """One module on its way through a course; every rank holds one and does the same."""

    def __init__(
        self,
        name: str,
        settings: TrainSettings,
        course: Course,
        trained: TrainedDraft,
        head: DraftHead,
        reference: ReferenceLosses | None,
    ) -> None:
        self.module = DraftLoss(trained, head, settings.unroll, settings.loss)
        self._name, self._settings, self._course, self._reference = name, settings, course, reference
        self._rank, self._world = distributed.get_rank(), distributed.get_world_size()
        self._device = head.weight_CH.device
        rows = max(1, course.rows.batch_rows // (self._world * course.num_micro))
        self._engine: Any = initialize(self.module, settings, course.num_micro, rows)
        self.step, self.seconds = 0, 0.0
        self.positions, self.flops = 0, 0.0
        self.curve: list[tuple[int, float]] = []
        self.held_out: list[tuple[int, float]] = []
        self.best: Best | None = None
        self.metrics: dict[str, float] = {"loss": math.nan}

    def run(self, checkpoint: Checkpoint | None, steps_done: StepsDone | None, held_out: list[int]) -> None:
        """Takes every step that is left, or as many as an early stop on the samples `held_out` allows.

        With an early stop the weights end as those of the best measurement, whether it stopped the run or not. The last
        step is always measured: unmeasured weights could be neither kept nor left. Without samples to measure, and
        without an early stop, the weights are those of the last step.
        """
        settings, num_steps = self._settings, self._course.num_steps
        every, clock = max(1, num_steps // CURVE_POINTS), Clock()
        while self.step < num_steps and not self._stopped():
            log = self.step % every == 0 or self.step + 1 == num_steps
            set_lr(self._engine, settings, self.step, num_steps)
            self._take_step(log=log)
            if log and steps_done is not None:
                steps_done(self.step + 1, num_steps)
            self.step += 1
            if held_out and self._measures():
                self._measure(held_out)
            if checkpoint is not None and self.step % settings.save_every == 0 and self.step < num_steps:
                self.seconds += clock.lap()
                checkpoint({"step": float(self.step), "seconds": self.seconds, **self.metrics})
                clock.lap()
        self._check()
        if self.best is not None and self.best.step < self.step:
            set_weights(self.module, self.best.weights)
        self.seconds += clock.lap()

    def _check(self) -> None:
        """That no weight went wrong since the loss was last looked at."""
        trained = (weight for weight in self.module.parameters() if weight.requires_grad)
        if not all(bool(torch.isfinite(weight).all()) for weight in trained):
            raise FloatingPointError(
                f"{self._name}: a weight is not finite after step {self.step}; lower the learning rate"
            )

    def save(self, folder: Path) -> None:
        """Every rank has to call it; the first one writes."""
        progress = Progress(self.step, tuple(self.curve), tuple(self.held_out), self.best)
        save_state(self._engine, folder, progress, writes=self._rank == 0)

    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote, at any number of ranks."""
        done = load_state(self._engine, folder)
        self.step, self.curve, self.held_out = done.step, list(done.curve), list(done.held_out)
        self.best = done.best
        if self.curve:
            self.metrics = {"loss": self.curve[-1][1]}

    def whole(self, numbers: list[int]) -> Iterable[Batch]:
        """This rank's share of some samples, once, on its device."""
        return (batch.to(self._device) for batch in self._course.whole(numbers, self._rank))

    def _stopped(self) -> bool:
        return self._settings.early_stop is not None and stops(self.held_out, self._settings.early_stop)

    def _measures(self) -> bool:
        """Whether the weights after `step` steps are to be measured."""
        stop, last = self._settings.early_stop, self.step == self._course.num_steps
        return stop is not None and (last or self.step % stop.every == 0)

    def _measure(self, held_out: list[int]) -> None:
        """All ranks find the same tau, and so keep the same weights."""
        tau = expected_tau(self.module, self.whole(held_out), self._world)
        self.held_out.append((self.step, tau))
        if better(tau, self.best):
            self.best = Best.of(self.step, tau, self.module)

    def _take_step(self, *, log: bool) -> None:
        batches = [batch.to(self._device) for batch in self._course.batches(self.step, self._rank)]
        counts_S = sum(_counts(batch, self.module.num_steps) for batch in batches)
        assert isinstance(counts_S, Tensor)
        totals_S = self._sum(counts_S)
        self.positions += int(totals_S[0])
        counted = self._course.counts_flops(self.step, FLOP_SAMPLES)
        sums_S, loss_sum = torch.zeros(len(totals_S), device=self._device), 0.0
        with FlopCounterMode(display=False) if counted else nullcontext() as counter:
            for batch, of in zip(batches, self._learned(batches, totals_S), strict=True):
                loss, alpha_S = self._forward_backward(batch, totals_S, of, measure=log)
                loss_sum += loss
                sums_S += alpha_S
        if counted:
            self.flops += counter.get_total_flops() * counted
        if log:
            self._log(loss_sum, sums_S, totals_S)

    def _learned(
        self, batches: list[Batch | Positions], totals_S: Tensor
    ) -> Sequence[tuple[Learned, ...] | None]:
        """What of each batch is learned from; None for a batch alone, whose own forward pass says it.

        A filter looks at all batches of the step before any is learned from: a forward pass more, without activations.
        """
        if self._reference is None:
            return [tuple(map(Learned, totals_S, totals_S))] * len(batches)
        if len(batches) == 1:
            return [None]
        with torch.no_grad():
            seen = [
                behind(self._forward(self.module, batch, divergence=True), self._reference)
                for batch in batches
            ]
        return learned(seen, totals_S, self._keep, self._world)

    @property
    def _keep(self) -> float:
        adaspec = self._settings.adaspec
        assert adaspec is not None  # there is a reference
        return keep_at(adaspec.keep, adaspec.warm, self.step / self._course.num_steps)

    def _forward(
        self, module: Any, batch: Batch | Positions, *, divergence: bool, alpha: bool = False
    ) -> tuple[StepLosses, ...]:
        """By the module, or by the engine around it."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.dtype == "bfloat16"):
            steps: tuple[StepLosses, ...] = module(batch, divergence=divergence, alpha=alpha)
        return steps

    def _forward_backward(
        self, batch: Batch | Positions, totals_S: Tensor, of: tuple[Learned, ...] | None, *, measure: bool
    ) -> tuple[float, Tensor]:
        """One batch's part of the loss, and its sums of alpha; gradients add up in the engine."""
        engine = self._engine
        steps = self._forward(engine, batch, divergence=of is None, alpha=measure)
        if of is None:
            assert self._reference is not None
            (of,) = learned([behind(steps, self._reference)], totals_S, self._keep, self._world)
        loss = mean_loss(steps, of, self._settings.hidden_weight, self._world)
        engine.backward(loss * self._course.num_micro)  # DeepSpeed divides by the number of backward passes
        engine.step()
        alphas = [step.distribution.alpha_M for step in steps] if measure else []
        sums = [alpha_M.sum() for alpha_M in alphas if alpha_M is not None]
        zeros = totals_S.new_zeros(len(totals_S), dtype=torch.float32)
        alpha_S = torch.stack(sums).float() if sums else zeros
        return (float(loss.detach()) / self._world if measure else 0.0), alpha_S

    def _log(self, loss: float, alpha_S: Tensor, totals_S: Tensor) -> None:
        means_S = alpha_S / totals_S.clamp(min=1)
        values = self._sum(torch.cat((torch.tensor([loss], device=self._device), means_S))).tolist()
        if not math.isfinite(values[0]):
            raise FloatingPointError(
                f"{self._name}: the loss is not finite at step {self.step}; lower the learning rate"
            )
        self.metrics = {"loss": values[0]} | {
            f"acceptance_{i + 1}": value for i, value in enumerate(values[1:])
        }
        self.curve.append((self.step, values[0]))

    def _sum(self, value: Tensor) -> Tensor:
        if self._world > 1:
            distributed.all_reduce(value)
        return value


def _counts(batch: Batch | Positions, num_steps: int) -> Tensor:
    """Positions of every unrolled step, int64 [S]."""
    if isinstance(batch, Positions):
        return torch.tensor([len(batch)], device=batch.residual_MH.device)
    return torch.stack([batch.mask(step).sum() for step in range(num_steps)])
