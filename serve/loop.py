"""One thread that owns every engine: they are not thread-safe, and a forward would block an event loop."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, TypeVar

from farm.decode.engine import Engine, Request

log = logging.getLogger("ray.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """What one request got from one step; with `refused`, `failed` or a finish reason it is the last."""

    version: str
    tokens: tuple[int, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    refused: str | None = None  # the engine does not take this request
    failed: str | None = None  # the thread died


Sink = Callable[[Progress], None]


@dataclass
class Lane:
    """An engine and the requests it was given; a lane that lost its route goes when they are done."""

    target: str
    version: str
    engine: Engine
    sinks: dict[str, Sink] = field(default_factory=dict)


class EngineLoop:
    """Steps the engines that have work, in turn. Every public method may be called from any thread.

    A sink is called from this thread and must return at once. If an engine raises, the thread ends, every
    open request is told, and `failure` says why.
    """

    def __init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self.failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._routes: dict[str, Lane] = {}
        self._lanes: list[Lane] = []
        self._stopping = False

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def host(self, target: str, version: str, engine: Engine) -> None:
        """Give new requests for `target` to `engine`; an engine it had before finishes what it was given."""
        self._commands.put(partial(self._host, Lane(target, version, engine)))

    def submit(self, target: str, request: Request, sink: Sink) -> None:
        """Queue a request for a hosted target; its progress goes to `sink`."""
        self._command(partial(self._submit, target, request, sink))

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its slot; nothing happens if it is done."""
        self._commands.put(partial(self._cancel, request_id))

    def inspect(self, look: Callable[[list[Lane], Mapping[str, Lane]], T]) -> "Future[T]":
        """What `look` says of all lanes and of the ones that take new requests, called between two steps."""
        answer: Future[T] = Future()
        self._command(lambda: answer.set_result(look(self._lanes, self._routes)))
        return answer

    def stop(self, wait_s: float = 0.0) -> None:
        """End the thread after the present step; open requests are told."""
        self._commands.put(self._end)
        self._thread.join(wait_s)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                for lane in list(self._lanes):
                    self._step(lane)
            self.failure = "stopped"
        except Exception as error:
            log.exception("the engine thread ends")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            for lane in self._lanes:
                for sink in lane.sinks.values():
                    sink(Progress(lane.version, failed=self.failure))
            self._obey_the_rest()

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        if self.failure is not None:  # the thread may have ended before it saw the command
            self._obey_the_rest()

    def _obey_the_rest(self) -> None:
        with suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _obey(self) -> None:
        """Run the queued commands; with nothing to decode, wait for one."""
        idle = not any(lane.engine.has_work for lane in self._lanes)
        while not self._stopping:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return
            command()
            idle = False

    def _step(self, lane: Lane) -> None:
        if lane.engine.has_work:
            for output in lane.engine.step():
                sink = lane.sinks.get(output.request_id)
                if output.finish_reason is not None:
                    lane.sinks.pop(output.request_id, None)
                if sink is not None:
                    sink(Progress(lane.version, output.tokens, output.finish_reason))
        if not lane.engine.has_work and self._routes.get(lane.target) is not lane:
            self._lanes.remove(lane)
            log.info("%s@%s: its last request is done, its engine is dropped", lane.target, lane.version)

    def _host(self, lane: Lane) -> None:
        self._routes[lane.target] = lane
        self._lanes.append(lane)

    def _submit(self, target: str, request: Request, sink: Sink) -> None:
        lane = self._routes[target]
        if self.failure is not None:
            sink(Progress(lane.version, failed=self.failure))
            return
        try:
            lane.engine.add(request)
        except ValueError as error:
            sink(Progress(lane.version, refused=str(error)))
            return
        lane.sinks[request.id] = sink

    def _cancel(self, request_id: str) -> None:
        for lane in self._lanes:
            if lane.sinks.pop(request_id, None) is not None:
                lane.engine.cancel(request_id)

    def _end(self) -> None:
        self._stopping = True
