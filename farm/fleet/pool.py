"""A bounded first-in first-out queue of driver tasks.

Ray starts everything it is given at once and in no order, and a training run without room waits for ever; so
the queue is here: at most `width` tasks are in flight and the next one starts when one ends.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError


class TargetFailed(Exception):
    """A target could not be fitted in a run with others; the last line of the text says why."""


@dataclass(frozen=True)
class Outcome:
    """How one task ended: `value` is what it returned, unless `error` is why it did not."""

    name: str
    value: Any = None
    error: BaseException | None = None


def run_bounded(
    specs: Mapping[str, tuple[Any, ...]],
    task: Any,
    width: int,
    on_start: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[Outcome]:
    """Run `task.remote(*args)` for each (name, args) of `specs`, `width` at a time; outcomes as they end.

    A task that raises, or whose process is killed or runs out of memory, is an outcome with an error and
    stops no other. `options` go to `task.options`. Tasks in flight when the consumer stops are cancelled.
    """
    if width < 1:
        raise ValueError(f"width must be at least 1, not {width}")
    waiting = iter(specs.items())
    live: dict[Any, str] = {}
    try:
        while True:
            while len(live) < width and (spec := next(waiting, None)):
                name, args = spec
                if on_start:
                    on_start(name)
                titled = task.options(name=f"{task.remote.__name__}:{name}", **options)
                live[titled.remote(*args)] = name
            if not live:
                return
            (done,), _ = ray.wait(list(live), num_returns=1)
            yield _outcome(live.pop(done), done)
    finally:
        for ref in live:
            ray.cancel(ref, force=True)


def _outcome(name: str, ref: Any) -> Outcome:
    try:
        return Outcome(name, value=ray.get(ref))
    except RayError as error:
        return Outcome(name, error=error)


def cause_of(error: BaseException) -> BaseException:
    """What the task raised, without the wrapping that Ray gives it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def describe(error: BaseException) -> str:
    """One line for a report: the kind of the error and the first line of its message.

    Of a failed training it is the last line, since its message is its workers' tracebacks.
    """
    from ray.train import TrainingFailedError

    cause = cause_of(error)
    lines = str(cause).strip().splitlines() or ["no message"]
    if isinstance(cause, TargetFailed | TrainingFailedError):
        return lines[-1]
    return f"{type(cause).__name__}: {lines[0]}"
