"""The floor of a decoding step: the bytes of the weights it has to read over the bandwidth this machine reads with."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from farm.target.forward import TargetForward

PROBE_BYTES = 512 * 2**20  # larger than any cache
PROBES = 5


@dataclass(frozen=True)
class Floor:
    """Of one target's step with one row. Weights that fit into a cache can be read faster than the floor says."""

    weight_bytes: int
    bytes_per_s: float

    @property
    def seconds(self) -> float:
        return self.weight_bytes / self.bytes_per_s


def measure_floor(target: TargetForward) -> Floor:
    """Every weight is read once a step, the embedding by one row only unless it is also the head."""
    embedding = 0 if target.head_weight is target.embedding else target.embedding.nbytes
    return Floor(target.num_bytes - embedding, read_bandwidth(str(target.device)))


def read_bandwidth(device: str) -> float:
    """Bytes a second of summing a large buffer, the median of some runs."""
    buffer = torch.ones(PROBE_BYTES // 4, dtype=torch.float32, device=device)
    rates = []
    for _ in range(PROBES):
        started = time.perf_counter()
        float(buffer.sum())
        rates.append(PROBE_BYTES / (time.perf_counter() - started))
    return statistics.median(rates)
