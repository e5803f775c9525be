"""Captures on a CPU: what a CUDA graph would repeat is recorded and repeated, and what it could not hold is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from farm.decode.engine import Engine
from farm.decode.graphs import Capture, Captured, Step, StepGraphs, Tensors
from farm.decode.steps import StaticSteps

aten = torch.ops.aten
# A value read by the host, a shape that depends on values, a tensor made of the host's values.
HOST = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal,
    aten._unique2, aten.unique_dim, aten.repeat_interleave.Tensor.overloadpacket, aten.lift_fresh, aten.lift,
}  # fmt: skip


class NoHost(TorchDispatchMode):
    """Refuses whatever would make a captured step wait for the host or repeat a value of the host's."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func.overloadpacket in HOST or by_mask:
            raise AssertionError(f"{func} cannot be captured")
        return func(*args, **(kwargs or {}))


def checked(step: Step, inputs: Tensors) -> Captured:
    """Runs the step under NoHost; replays run it again as it is."""
    with NoHost():
        outputs = step(*inputs)
    own = tuple(one.clone() for one in inputs)
    return Captured(step, own, outputs, into(lambda: step(*own), outputs))


def recorded(step: Step, inputs: Tensors) -> Captured:
    """Records the operators; replays repeat these, on the same tensors, without any of the step's Python."""
    own = tuple(one.clone() for one in inputs)
    graph = make_fx(lambda *tensors: step(*tensors))(*own)
    outputs = step(*own)
    return Captured(step, own, outputs, into(lambda: graph(*own), outputs))


def into(compute: Callable[[], Tensors], outputs: Tensors) -> Callable[[], None]:
    """As a graph's replay: always to the same memory."""

    def replay() -> None:
        for output, new in zip(outputs, compute(), strict=True):
            output.copy_(new)

    return replay


def with_capture(engine: Engine, capture: Capture) -> StepGraphs:
    """Replaces how an engine captures its steps; before any request."""
    steps, drafting = engine.runner.steps, engine.runner.drafting
    assert isinstance(steps, StaticSteps)
    graphs = StepGraphs(capture)
    engine.runner.steps = StaticSteps(steps.buckets, graphs, steps.spare)
    if drafting is not None:
        drafting._steps = engine.runner.steps
    return graphs
