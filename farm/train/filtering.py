# N samples, S unrolled steps, T draft positions, M positions
"""The AdaSPEC filter in a run: a reference's losses, cached, and which positions of a batch are learned from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from farm.train.adaspec import Threshold, histogram, kept, threshold
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
    if world > 1:
        distributed.all_reduce(loss_NST)
    device = next(module.parameters()).device
    return ReferenceLosses(loss_NST.clamp(max=torch.finfo(torch.float16).max).half().to(device))


def learned(
    steps: tuple[StepLosses, ...],
    totals_S: Tensor,
    filtered: tuple[ReferenceLosses, float] | None,
    world: int,
) -> tuple[Learned, ...]:
    """What of one of a step's batches is learned from, on all ranks.

    Args:
        totals_S: positions of the whole step at each unrolled step, over its batches and ranks.
        filtered: the reference and the share that is kept; None learns from every position.
    """
    if filtered is None:
        return tuple(Learned(total, total) for total in totals_S)
    reference, keep = filtered
    out = []
    for number, (step, total) in enumerate(zip(steps, totals_S, strict=True)):
        divergence_M = step.distribution.divergence_M
        assert divergence_M is not None
        delta_M = divergence_M - reference.at(step.at, number)
        counts_N = _sum(histogram(delta_M), world)
        found: Threshold = threshold(counts_N, keep)
        kept_M = kept(delta_M, step.at.uid_M, found)
        num_kept = _sum(kept_M.sum(), world)
        share = _sum(torch.tensor(len(delta_M), device=total.device), world) / total.clamp(min=1)
        out.append(Learned(total, num_kept / share, kept_M))
    return tuple(out)


def _sum(value: Tensor, world: int) -> Tensor:
    if world > 1:
        distributed.all_reduce(value)
    return value
