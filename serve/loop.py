"""One thread that owns the engines: they are not thread-safe, and a forward would block an event loop."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeVar

from farm.decode.engine import Engine, Output, Request, Route

log = logging.getLogger("ray.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """What one request got from one step; with `refused`, `failed` or a finish reason it is the last."""

    version: str
    tokens: tuple[int, ...] = ()
    num_drafted: int | None = None  # of the tokens, the first ones; None: they are not of a round
    finish_reason: Literal["stop", "length"] | None = None
    refused: str | None = None  # the engine does not take this request
    failed: str | None = None  # the thread died


Sink = Callable[[Progress], None]


@dataclass
class Lane:
    """A version of a target, the engine that decodes it, and its open requests; when replaced it goes with them."""

    target: str
    version: str
    engine: Engine
    sinks: dict[str, Sink] = field(default_factory=dict)

    @property
    def route(self) -> str:
        """The name under which the engine hosts it."""
        return f"{self.target}@{self.version}"


class EngineLoop:
    """Steps the engines that have work, in turn. Every public method may be called from any thread.

    Targets share an engine, and with it every step, where their models have one shape; `new_engine` makes another one
    where they do not. A sink is called from this thread and must return at once. If an engine raises, the thread ends,
    every open request is told, and `failure` says why.
    """

    def __init__(self, new_engine: Callable[[Route], Engine]) -> None:
        self._new_engine = new_engine
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self.failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._engines: list[Engine] = []
        self._current: dict[str, Lane] = {}
        self._lanes: list[Lane] = []
        self._lane_of: dict[str, Lane] = {}  # by request
        self._stopping = False

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def host(self, target: str, version: str, route: Route) -> None:
        """Give new requests for `target` to this version; the one before finishes what it was given."""
        self._commands.put(partial(self._host, target, version, route))

    def submit(self, target: str, request: Request, sink: Sink) -> None:
        """Queue a request for a hosted target; its progress goes to `sink`."""
        self._command(partial(self._submit, target, request, sink))

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its slot; nothing happens if it is done."""
        self._commands.put(partial(self._cancel, request_id))

    def inspect(self, look: Callable[[list[Lane], Mapping[str, Lane]], T]) -> "Future[T]":
        """What `look` says of all lanes and of the ones that take new requests, called between two steps."""
        answer: Future[T] = Future()
        self._command(lambda: answer.set_result(look(self._lanes, self._current)))
        return answer

    def stop(self, wait_s: float = 0.0) -> None:
        """End the thread after the present step; open requests are told."""
        self._commands.put(self._end)
        self._thread.join(wait_s)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                for engine in self._engines:
                    if engine.has_work:
                        self._deliver(engine.step())
                self._drop_replaced()
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
        idle = not any(engine.has_work for engine in self._engines)
        while not self._stopping:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return
            command()
            idle = False

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            lane = self._lane_of[output.request_id]
            sink = lane.sinks[output.request_id]
            if output.finish_reason is not None:
                del lane.sinks[output.request_id], self._lane_of[output.request_id]
            sink(Progress(lane.version, output.tokens, output.num_drafted, output.finish_reason))

    def _drop_replaced(self) -> None:
        for lane in list(self._lanes):
            if not lane.sinks and self._current[lane.target] is not lane:
                lane.engine.drop(lane.route)
                self._lanes.remove(lane)
                log.info("%s: its last request is done, it is dropped", lane.route)

    def _host(self, target: str, version: str, route: Route) -> None:
        lane = next((one for one in self._lanes if (one.target, one.version) == (target, version)), None)
        if lane is None:  # else it still has requests, and a version never changes
            lane = Lane(target, version, self._engine_for(replace(route, target=f"{target}@{version}")))
            self._lanes.append(lane)
        self._current[target] = lane

    def _engine_for(self, route: Route) -> Engine:
        """The first engine that can host the route, with the route in it."""
        for engine in self._engines:
            with suppress(ValueError):
                engine.host(route)
                return engine
        engine = self._new_engine(route)
        self._engines.append(engine)
        return engine

    def _submit(self, target: str, request: Request, sink: Sink) -> None:
        lane = self._current[target]
        if self.failure is not None:
            sink(Progress(lane.version, failed=self.failure))
            return
        try:
            lane.engine.add(replace(request, target=lane.route))
        except ValueError as error:
            sink(Progress(lane.version, refused=str(error)))
            return
        lane.sinks[request.id], self._lane_of[request.id] = sink, lane

    def _cancel(self, request_id: str) -> None:
        lane = self._lane_of.pop(request_id, None)
        if lane is not None:
            del lane.sinks[request_id]
            lane.engine.cancel(request_id)

    def _end(self) -> None:
        self._stopping = True
