# B rows, T draft positions, M masked ones of B T, L tokens, H hidden
"""Batches of samples: which rows a step sees follows from seed and step alone, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.data.features import Sample

MAX_TOKENS = 2**20  # of one sample


@dataclass(frozen=True)
class Where:
    """Which positions: sample number and index in it, int64 [M] each."""

    sample_M: Tensor
    index_M: Tensor

    @property
    def uid_M(self) -> Tensor:  # noqa: N802 - a tensor's name carries its shape
        """A name for each position, the same in every batch and on every rank."""
        return self.sample_M * MAX_TOKENS + self.index_M


@dataclass(frozen=True)
class Batch:
    """Right-padded rows. Index t holds token x_{t+1} beside h_t; T = longest row's L - 1."""

    next_tokens_BT: Tensor  # x_{t+1}, int64, 0 where padded
    hidden_BTH: Tensor  # h_t
    turn_BT: Tensor  # the target's turn that said x_{t+1}, int64; -1 where none did: prompts, padding
    sample_B: Tensor  # number of the row's sample, int64

    def mask(self, step: int) -> Tensor:
        """Indices [B, T] trained on at unrolled step `step`: rounds that begin in a turn and have not left it.

        At index t a round has committed x_{t+1}; it predicts h_{t+1+step}, which exists then, and of that x_{t+2+step}.
        """
        drafted_BT = torch.full_like(self.turn_BT, -1)
        drafted_BT[:, : -1 - step] = self.turn_BT[:, 1 + step :]
        return (self.turn_BT >= 0) & (self.turn_BT == drafted_BT)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on a device, hidden states in float32."""
        move = (self.next_tokens_BT.to(device), self.hidden_BTH.to(device, torch.float32))
        return Batch(*move, self.turn_BT.to(device), self.sample_B.to(device))

    def masked(self, step: int) -> Tensor:
        """Where `mask(step)` is true among the B * T positions, int64 [M] ascending."""
        return self.mask(step).flatten().nonzero().squeeze(1)

    def where(self, step: int) -> Where:
        """Sample and index of every position of `mask(step)`, in its order."""
        at_M, length = self.masked(step), self.next_tokens_BT.shape[1]
        return Where(self.sample_B[at_M // length], at_M % length)


def collate(
    samples: Sequence[Sample], *, prompt_tokens: bool = False, numbers: Sequence[int] | None = None
) -> Batch:
    """One batch of samples, padded to the longest; `prompt_tokens` trains on the prompts too.

    `numbers` are the samples' numbers in their data set; None counts them from 0.
    """
    length = max(len(sample.tokens_T) for sample in samples) - 1
    hidden_size = samples[0].features_TH.shape[1]
    tokens_BT = torch.zeros(len(samples), length, dtype=torch.int64)
    hidden_BTH = torch.zeros(len(samples), length, hidden_size, dtype=samples[0].features_TH.dtype)
    turn_BT = torch.full_like(tokens_BT, -1)
    for row, sample in enumerate(samples):
        tokens_BT[row, : len(sample.tokens_T) - 1] = sample.tokens_T[1:]
        hidden_BTH[row, : len(sample.features_TH)] = sample.features_TH
        said = ((1, len(sample.tokens_T)),) if prompt_tokens else sample.said
        for turn, (start, end) in enumerate(said):
            turn_BT[row, start - 1 : end - 1] = turn
    sample_B = torch.tensor(range(len(samples)) if numbers is None else numbers)
    return Batch(tokens_BT, hidden_BTH, turn_BT, sample_B)


class Schedule:
    """The rows of every step of a run: `epochs` shuffles of the samples cut into full batches of `batch_rows`.

    The rows that a shuffle leaves over are dropped for that epoch, so that every rank has rows at every step.
    """

    def __init__(self, num_samples: int, batch_rows: int, epochs: int, seed: int) -> None:
        self.batch_rows = min(batch_rows, num_samples)
        self.steps_per_epoch = num_samples // self.batch_rows
        self.num_steps = epochs * self.steps_per_epoch
        self._num_samples, self._seed = num_samples, seed
        self._order: tuple[int, Tensor] | None = None  # of the epoch that was asked for last

    def batch(self, step: int) -> Tensor:
        """Sample numbers of a step's whole batch, int64."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(self._num_samples, generator=generator)
        return self._order[1][index * self.batch_rows : (index + 1) * self.batch_rows]

    def rows(self, step: int, rank: int = 0, world: int = 1) -> list[int]:
        """Sample numbers of one rank at a step; together the ranks have the step's batch."""
        return self.batch(step)[rank::world].tolist()
