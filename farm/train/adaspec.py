# M positions, N bins
"""The AdaSPEC filter: learn from the positions where a draft of this size can still get better.

    delta = KL(p | q) - KL(p | q_ref)         q_ref: the same draft, distilled without a filter, then frozen
    kept  = the share `keep` of all positions with the largest delta

AdaSPEC's code takes the quantile of each micro-batch on each rank, which keeps the same share of every batch, even of
one that has nothing to teach. Here it is that of the global batch, by a histogram that ranks add up; inside the bin
where the threshold falls, positions are kept by a hash of what they are, so that the number of workers changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

NUM_BINS: Final = 1024
LIMIT: Final = 8.0  # nats; beyond it a position counts in the outermost bin
_HASH_RANGE: Final = 2**20


@dataclass(frozen=True)
class Threshold:
    """Every position above bin `bin` is kept, and a share of those inside it."""

    bin: int
    share: float


def histogram(delta_M: Tensor) -> Tensor:
    """Counts of delta, int64 [N]; positions that are not finite are left out. Counts of ranks add up."""
    finite_M = delta_M[torch.isfinite(delta_M)]
    return torch.bincount(_bins(finite_M), minlength=NUM_BINS)


def threshold(counts_N: Tensor, keep: float) -> Threshold:
    """Where the share `keep` of the counted positions lies above; everything for a keep of 1, or for no positions."""
    wanted = keep * float(counts_N.sum())
    above_N = counts_N.flip(0).cumsum(0).flip(0).double()  # positions in this bin and above
    reached = torch.nonzero(above_N >= wanted).flatten()
    edge = int(reached[-1])
    inside = float(counts_N[edge])
    if not inside:
        return Threshold(edge, 1.0)
    return Threshold(edge, 1.0 - (float(above_N[edge]) - wanted) / inside)


def kept(delta_M: Tensor, uid_M: Tensor, found: Threshold) -> Tensor:
    """Which positions are learned from, bool [M]; `uid_M` names each position, whatever batch or rank it is in."""
    finite_M = torch.isfinite(delta_M)
    bin_M = _bins(delta_M.nan_to_num(0.0, 0.0, 0.0))
    inside_M = (bin_M == found.bin) & (_unit_hash(uid_M) < found.share)
    return finite_M & ((bin_M > found.bin) | inside_M)


def keep_at(keep: float, warm: float, progress: float) -> float:
    """The share kept at `progress` of a run: all for the first `warm`, then linearly to `keep` within as much again."""
    if warm <= 0:
        return keep
    return 1.0 + (keep - 1.0) * min(1.0, max(0.0, progress / warm - 1.0))


def _bins(delta_M: Tensor) -> Tensor:
    scaled_M = (delta_M.float() + LIMIT) * (NUM_BINS / (2 * LIMIT))
    return scaled_M.floor().clamp(0, NUM_BINS - 1).long()


def _unit_hash(uid_M: Tensor) -> Tensor:
    """A number in [0, 1) that follows from a position's name (the finaliser of MurmurHash3, on 32 bits)."""
    x_M = uid_M.long() & 0xFFFFFFFF
    for factor, bits in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x_M = ((x_M ^ (x_M >> bits)) * factor) & 0xFFFFFFFF
    return ((x_M ^ (x_M >> 16)) % _HASH_RANGE).double() / _HASH_RANGE
