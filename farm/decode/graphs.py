"""Steps of static shape as CUDA graphs: captured when they come again, replayed from then on.

A decoding step of a small batch is hundreds of kernels of some microseconds each; launching them takes longer than
they do. A graph launches them all at once. It repeats the very kernels on the very addresses of its capture, so that
all that changes from step to step has to be in the tensors that a step is called with, and nothing in it may wait for
the host. Where there is no CUDA the steps simply run.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from farm.decode.drafts import KEPT_TRUNKS

Tensors = tuple[Tensor, ...]
Step = Callable[..., Tensors]
MOST_GRAPHS = 128
MOST_SEEN = 4 * MOST_GRAPHS  # keys that came once and may come again
WARM_UPS = 2  # runs before a capture: libraries choose their kernels and take their workspaces

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """A step over tensors of its own: `replay` computes `outputs` from `inputs` anew."""

    step: Step  # keeps alive what the graph has the addresses of
    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]

    def __call__(self, inputs: Tensors) -> Tensors:
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.replay()
        # Graphs share their memory: another one's replay may overwrite what this one put out.
        return tuple(output.clone() for output in self.outputs)


Capture = Callable[[Step, Tensors], Captured]


class StepGraphs:
    """The captured steps of one engine, the least recently used of which are dropped.

    A capture costs more than a few steps: what comes once, and not again before MOST_SEEN others have, runs as it is.
    Where a capture fails, all run as they are. Captured steps keep their weights alive: of trunks that are made for one
    target, as many as drafts keep.
    """

    def __init__(self, capture: Capture | None) -> None:
        """`capture` is None where steps are not to be captured."""
        self._capture = capture
        self._captured: OrderedDict[Hashable, Captured] = OrderedDict()
        self._trunks: OrderedDict[int, set[Hashable]] = OrderedDict()  # keys of steps by such a trunk's id
        self._seen_once: OrderedDict[Hashable, None] = OrderedDict()

    @classmethod
    def on(cls, device: torch.device) -> StepGraphs:
        """CUDA graphs on a CUDA device, none elsewhere."""
        return cls(CudaCapture() if device.type == "cuda" else None)

    def __len__(self) -> int:
        return len(self._captured)

    def run(
        self, key: Hashable, make: Callable[[], Step], inputs: Tensors, trunk: object | None = None
    ) -> Tensors:
        """Outputs of the step that `make` makes. Steps of one key differ in nothing but their inputs' values.

        `trunk` is one that was made for the step's target.
        """
        if self._capture is None:
            return make()(*inputs)
        if trunk is not None:
            self._make_room(id(trunk), key)
        if key not in self._captured:
            if self._is_new(key) or not self._try(self._capture, key, make(), inputs):
                return make()(*inputs)
        self._captured.move_to_end(key)
        return self._captured[key](inputs)

    def forget(self) -> None:
        """Drops all; weights may go, or move."""
        self._captured.clear()
        self._seen_once.clear()
        self._trunks.clear()

    def _make_room(self, trunk: int, key: Hashable) -> None:
        """Drops the steps of trunks that were not among the last."""
        self._trunks.setdefault(trunk, set()).add(key)
        self._trunks.move_to_end(trunk)
        while len(self._trunks) > KEPT_TRUNKS:
            for gone in self._trunks.popitem(last=False)[1]:
                self._captured.pop(gone, None)
                self._seen_once.pop(gone, None)

    def _is_new(self, key: Hashable) -> bool:
        """Whether the key has not been seen; it has from now on, until it is captured or many others were seen."""
        if key in self._seen_once:
            del self._seen_once[key]
            return False
        self._seen_once[key] = None
        if len(self._seen_once) > MOST_SEEN:
            self._seen_once.popitem(last=False)
        return True

    def _try(self, capture: Capture, key: Hashable, step: Step, inputs: Tensors) -> bool:
        try:
            self._captured[key] = capture(step, inputs)
        except RuntimeError:
            log.exception("a decoding step cannot be captured; steps run without graphs from now on")
            self._capture = None
            self.forget()
            return False
        while len(self._captured) > MOST_GRAPHS:
            self._captured.popitem(last=False)
        return True


class CudaCapture:
    """Captures steps as CUDA graphs that share one memory pool of their own."""

    def __init__(self) -> None:
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step, inputs: Tensors) -> Captured:
        own = tuple(one.clone() for one in inputs)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step(*own)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls count: another one may be loading a target meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = step(*own)
        return Captured(step, own, outputs, graph.replay)
