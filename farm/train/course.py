# N samples, M positions
"""The course of a run: which batch every step sees, cached positions first and whole rows after."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from farm.data.features import Sample
from farm.sections import AdaptSettings, TrainSettings
from farm.train.batches import Batch, Schedule, collate
from farm.train.cached import Positions


def split_held_out(numbers: Sequence[int], settings: TrainSettings) -> tuple[list[int], list[int]]:
    """Numbers of the samples that are trained on, and of those that an early stop is judged by; at least one each."""
    if settings.early_stop is None or len(numbers) < 2:
        return list(numbers), []
    shuffled = sorted(numbers)
    random.Random(settings.seed).shuffle(shuffled)
    count = max(1, min(len(numbers) - 1, round(settings.early_stop.held_out * len(numbers))))
    return sorted(shuffled[count:]), sorted(shuffled[:count])


def rows_at_once(settings: TrainSettings) -> int:
    """Rows that a worker passes through a model together."""
    return min(settings.batch_rows, settings.micro_rows or settings.batch_rows)


class Course:
    """Batches by step, rank and number of ranks; the same positions at a step whatever that number is."""

    def __init__(
        self,
        samples: Sequence[Sample],
        numbers: Sequence[int],
        settings: TrainSettings,
        positions: Positions | None,
        world: int = 1,
    ) -> None:
        """`numbers` says which samples are trained on; `positions` are theirs, for a form that begins cached."""
        self._samples, self.numbers, self._settings = samples, list(numbers), settings
        self._positions, self._world = positions, world
        cached_epochs, row_epochs = _epochs(settings)
        self.rows = Schedule(len(self.numbers), settings.batch_rows, row_epochs, settings.seed)
        self.cached: Schedule | None = None
        if positions is not None and isinstance(settings, AdaptSettings):
            self.cached = Schedule(len(positions), settings.cached_tokens, cached_epochs, settings.seed)
        self.num_cached = 0 if self.cached is None else self.cached.num_steps
        self.num_steps = self.num_cached + self.rows.num_steps
        least, most = self.rows.batch_rows // world, -(-self.rows.batch_rows // world)  # rows of a rank
        self.num_micro = min(max(1, least), -(-most // (settings.micro_rows or most)))

    def batches(self, step: int, rank: int) -> list[Batch | Positions]:
        """One rank's batches of a step, whose gradients add up; always `num_micro` of them."""
        if self.cached is not None and step < self.num_cached:
            assert self._positions is not None
            mine = self.cached.batch(step)[rank :: self._world]
            device = self._positions.residual_MH.device
            return [self._positions.take(mine[i :: self.num_micro].to(device)) for i in range(self.num_micro)]
        picked = [self.numbers[i] for i in self.rows.rows(step - self.num_cached, rank, self._world)]
        return [self.collate(picked[i :: self.num_micro]) for i in range(self.num_micro)]

    def whole(self, numbers: Sequence[int], rank: int) -> Iterator[Batch]:
        """One rank's share of some samples, once, in batches of rows of similar length."""
        mine = sorted(numbers, key=lambda number: len(self._samples[number].tokens_T))[rank :: self._world]
        count = rows_at_once(self._settings)
        for start in range(0, len(mine), count):
            yield self.collate(mine[start : start + count])

    def with_settings(self, settings: TrainSettings) -> Course:
        """The same samples and cached positions under other settings."""
        return Course(self._samples, self.numbers, settings, self._positions, self._world)

    @property
    def num_samples(self) -> int:
        return len(self._samples)

    @property
    def longest(self) -> int:
        """Draft positions of the longest sample."""
        return max(len(sample.tokens_T) for sample in self._samples) - 1

    def counts_flops(self, step: int, times: int) -> float:
        """How many steps a step stands for when operations are counted `times` times in each form; mostly 0."""
        first, count = (
            (0, self.num_cached) if step < self.num_cached else (self.num_cached, self.rows.num_steps)
        )
        every = -(-count // times)
        if (step - first) % every:
            return 0
        return min(every, first + count - step)

    def collate(self, numbers: Sequence[int]) -> Batch:
        """Whole rows as one batch."""
        rows = [self._samples[number] for number in numbers]
        return collate(rows, prompt_tokens=self._settings.prompt_tokens, numbers=numbers)


def _epochs(settings: TrainSettings) -> tuple[int, int]:
    """Epochs in the cached form, and over whole rows."""
    form = settings.form if isinstance(settings, AdaptSettings) else "unrolled"
    if form == "unrolled" or not isinstance(settings, AdaptSettings):
        return 0, settings.epochs
    return (settings.epochs, 0) if form == "cached" else (settings.cached_epochs, settings.epochs)
