# N samples, or bins of a histogram; S unrolled steps, T draft positions, M positions, X batches of a step
"""The AdaSPEC filter in a run: a reference's losses, cached, and which positions of a step are learned from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from farm.train.adaspec import histogram, kept, threshold
from farm.train.batches import Batch, Where
from farm.train.module import DraftLoss, Learned, StepLosses

REFERENCE_FILE = "reference.safetensors"


class ReferenceLosses:
    """Forward KL of the reference at every position and unrolled step, float16: 2 bytes each."""

    def __init__(self, loss_NST: Tensor) -> None:
        self._loss_NST = loss_NST

    def at(self, where: Where, step: int) -> Tensor:
        """[M] float32."""
        return self._loss_NST[where.sample_M, step, where.index_M].float()

    def save(self, folder: Path) -> None:
        save_file({"loss": self._loss_NST.cpu()}, folder / REFERENCE_FILE)

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> ReferenceLosses:
        return cls(load_file(folder / REFERENCE_FILE)["loss"].to(device))


@torch.no_grad()
def reference_losses(
    module: DraftLoss, batches: Iterable[Batch], num_samples: int, length: int, world: int
) -> ReferenceLosses:
    """What a trained reference loses on the rows of `batches`, which ranks share out among them."""
    loss_NST = torch.zeros(num_samples, module.num_steps, length)
    for batch in batches:
        for step, losses in enumerate(module(batch, divergence=True)):
            divergence_M = losses.distribution.divergence_M
            assert divergence_M is not None
            loss_NST[losses.at.sample_M.cpu(), step, losses.at.index_M.cpu()] = divergence_M.float().cpu()
    device = next(module.parameters()).device
    if world > 1:
        loss_NST = loss_NST.to(device)  # NCCL reduces no tensor of the CPU
        distributed.all_reduce(loss_NST)
    return ReferenceLosses(loss_NST.clamp(max=torch.finfo(torch.float16).max).half().to(device))


@dataclass(frozen=True)
class Behind:
    """How far the draft is behind the reference at each position of one unrolled step of one batch, [M] each."""

    delta_M: Tensor  # nats
    uid_M: Tensor


def behind(steps: Sequence[StepLosses], reference: ReferenceLosses) -> tuple[Behind, ...]:
    """Of every unrolled step, from losses that were asked for their divergence."""
    out = []
    for number, step in enumerate(steps):
        divergence_M = step.distribution.divergence_M
        assert divergence_M is not None
        delta_M = divergence_M.detach() - reference.at(step.at, number)
        out.append(Behind(delta_M, step.at.uid_M))
    return tuple(out)


def learned(
    batches: Sequence[tuple[Behind, ...]], totals_S: Tensor, keep: float, world: int
) -> list[tuple[Learned, ...]]:
    """What of each of this rank's batches is learned from: the share `keep` of all positions of one optimizer step.

    Each unrolled step has one threshold, over all batches on all ranks, so that how a step is cut decides nothing.

    Args:
        totals_S: positions of the whole step at each unrolled step, over its batches and ranks.
    """
    by_step = list(zip(*batches, strict=True))  # [S] of this rank's batches
    counts_SN = torch.stack([histogram(torch.cat([one.delta_M for one in parts])) for parts in by_step])
    found = [threshold(counts_N, keep) for counts_N in _sum(counts_SN, world)]
    masks = [
        [kept(one.delta_M, one.uid_M, at) for one, at in zip(batch, found, strict=True)] for batch in batches
    ]
    num_kept_XS = torch.stack([torch.stack([kept_M.sum() for kept_M in batch]) for batch in masks])
    num_kept_S = _sum(num_kept_XS.sum(0), world)
    return [tuple(map(Learned, totals_S, num_kept_S, batch)) for batch in masks]


def _sum(value: Tensor, world: int) -> Tensor:
    if world > 1:
        distributed.all_reduce(value)
    return value
