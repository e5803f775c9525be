"""The floor of a decoding step: the bytes of the weights it has to read over the bandwidth this machine reads with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from farm.decode.routes import Route
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
    """Of a target on this machine."""
    return Floor(step_bytes(target), read_bandwidth(str(target.device)))


def step_bytes(target: TargetForward) -> int:
    """Of the layers and of the head, each read once a step; an embedding, tied to it or not, gives a row a token.

    A CPU keeps the head twice, as it was loaded and laid out for products: these read the second alone.
    """
    return target.head.num_bytes + sum(layer.num_bytes for layer in target.layers)


def round_bytes(routes: Sequence[Route], forwards: int) -> int:
    """Of weights that a round with rows of all these targets reads, with so many forwards of their drafts.

    A checkpoint and its head are read once for all rows, a trunk and the head that drafts have once a forward; a LoRA,
    a private expert and changes to the trunk by the rows of their target alone.
    """
    checkpoints = {id(route.forward): cast(TargetForward, route.forward) for route in routes}.values()
    loras = [route.lora.flat_EP for route in routes if route.lora is not None]
    # What is fused of several projections is zero outside of blocks, which nothing reads.
    verified = sum(map(step_bytes, checkpoints)) + sum(int(x.count_nonzero()) * x.itemsize for x in loras)
    drafts = [route.draft for route in routes if route.draft is not None]
    if not drafts or not forwards:
        return verified
    trunk = drafts[0].trunk
    own = sum(_bytes(draft) - _bytes(trunk) for draft in drafts)
    heads = sum(_head_bytes(one, trunk.vocabulary_C) for one in checkpoints)
    return verified + forwards * (_bytes(trunk) + own + heads)


def _head_bytes(target: TargetForward, vocabulary_C: Tensor | None) -> int:
    """Of a target's head as drafts read it: the rows of their vocabulary alone, where it is pruned."""
    head_VH = target.head_weight
    num_rows = len(head_VH) if vocabulary_C is None else len(vocabulary_C)
    return num_rows * head_VH.shape[1] * head_VH.itemsize


def _bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def read_bandwidth(device: str) -> float:
    """Bytes a second of summing a large buffer, the median of some runs."""
    buffer = torch.ones(PROBE_BYTES // 4, dtype=torch.float32, device=device)
    rates = []
    for _ in range(PROBES):
        started = time.perf_counter()
        float(buffer.sum())
        rates.append(PROBE_BYTES / (time.perf_counter() - started))
    return statistics.median(rates)
