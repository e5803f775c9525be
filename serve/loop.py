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

from farm.decode.engine import Completion, Engine, Output, Request, Route
from farm.decode.logprobs import TokenLogprob
from farm.decode.stats import DecodeStats
from serve.canary import WorseTest, takes

FIRST_CHOICE = "0"  # behind the slash of a choice's id, which begins with its request's
UNDRAFTED = 0.9  # share of a request's rounds from which on it counts as decoded plainly
log = logging.getLogger("ray.serve")
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """What one request got from one step; with `unhosted`, `refused`, `failed` or a finish reason it is the last."""

    version: str
    tokens: tuple[int, ...] = ()
    num_drafted: int | None = None  # of the tokens, the first ones; None: they are not of a round
    finish_reason: Literal["stop", "length"] | None = None
    unhosted: str | None = None  # the target@version that was asked for by name
    refused: str | None = None  # the engine does not take this request
    failed: str | None = None  # the thread died
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens, if they were asked for
    stop_token: int | None = None  # that ended it, not among the tokens


Sink = Callable[[Progress], None]


@dataclass
class Lane:
    """A version of a target, the engine that decodes it, and its open requests; when replaced it goes with them."""

    target: str
    version: str
    engine: Engine
    sinks: dict[str, Sink] = field(default_factory=dict)
    share: float = 1.0  # of the new requests, while it is the canary
    test: WorseTest | None = None  # against the current lane, while it is the canary
    plain_in_a_row: int = 0  # finished requests since the last one that drafted

    @property
    def route(self) -> str:
        """The name under which the engine hosts it."""
        return f"{self.target}@{self.version}"


@dataclass(frozen=True)
class Admitted:
    """An open request. `test` is the one it was assigned by chance for; None: it says nothing about a canary."""

    lane: Lane
    test: WorseTest | None
    may_draft: bool


class EngineLoop:
    """Steps the engines that have work, in turn. Every public method may be called from any thread.

    Targets share an engine, and with it every step, where their models have one shape; `new_engine` makes another one
    where they do not. A sink is called from this thread and must return at once. If an engine raises, the thread ends,
    every open request is told, and `failure` says why. A lane whose last request is done is given to `before_drop`,
    from this thread, before its engine forgets what it counted.
    """

    def __init__(
        self, new_engine: Callable[[Route], Engine], before_drop: Callable[[Lane], None] = lambda _: None
    ) -> None:
        self._new_engine, self._before_drop = new_engine, before_drop
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self.failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._engines: list[Engine] = []
        self._current: dict[str, Lane] = {}
        self._canary: dict[str, Lane] = {}
        self._lanes: list[Lane] = []
        self._admitted: dict[str, Admitted] = {}  # by request
        self._stopping = False

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def host(self, target: str, version: str, route: Route) -> None:
        """Give new requests for `target` to this version; the one before finishes what it was given."""
        self._commands.put(partial(self._host, target, version, route))

    def host_canary(self, target: str, version: str, route: Route, share: float, test: WorseTest) -> None:
        """Give a share of the new requests for a hosted target to this version, and judge it by `test`."""
        self._commands.put(partial(self._host_canary, target, version, route, share, test))

    def end_canary(self, target: str) -> None:
        """Give all new requests to the current version; the canary finishes what it was given."""
        self._commands.put(partial(self._end_canary, target))

    def submit(self, target: str, request: Request, sink: Sink, version: str | None = None) -> None:
        """Queue a request for a hosted target, or for one version of it; its progress goes to `sink`."""
        self._command(partial(self._submit, target, request, sink, version))

    def cancel(self, request_id: str) -> None:
        """Forget a request and free its slot; nothing happens if it is done."""
        self._commands.put(partial(self._cancel, request_id))

    def inspect(self, look: Callable[[list[Lane], Mapping[str, Lane]], T]) -> "Future[T]":
        """What `look` says of all lanes and of the ones that take new requests, called between two steps.

        What it raises is raised by the future. One that is cancelled before is not looked for.
        """
        answer: Future[T] = Future()
        self._command(lambda: _settle(answer, lambda: look(self._lanes, self._current)))
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
            # Whoever gives a command now has it obeyed in his own thread, which may end other requests meanwhile.
            for lane in list(self._lanes):
                for sink in list(lane.sinks.values()):
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
            lane = self._admitted[output.request_id].lane
            sink = lane.sinks[output.request_id]
            if output.completion is not None:
                del lane.sinks[output.request_id]
                self._count(self._admitted.pop(output.request_id), output.completion.stats)
            sink(
                Progress(
                    lane.version,
                    output.tokens,
                    num_drafted=output.num_drafted,
                    finish_reason=output.finish_reason,
                    logprobs=output.logprobs,
                    stop_token=_stop_token(output.completion),
                )
            )

    def _drop_replaced(self) -> None:
        for lane in list(self._lanes):
            kept = (self._current[lane.target], self._canary.get(lane.target))
            if not lane.sinks and not any(lane is one for one in kept):
                self._before_drop(lane)
                lane.engine.drop(lane.route)
                self._lanes.remove(lane)
                log.info("%s: its last request is done, it is dropped", lane.route)

    def _host(self, target: str, version: str, route: Route) -> None:
        lane = self._lane(target, version, route)
        if self._current.get(target) is lane:
            return
        self._current[target] = lane
        canary = self._canary.get(target)
        if canary is lane:
            self._end_canary(target)
        elif canary is not None and canary.test is not None:
            canary.test = canary.test.again()  # what it is compared with is another one now

    def _host_canary(self, target: str, version: str, route: Route, share: float, test: WorseTest) -> None:
        self._end_canary(target)
        lane = self._lane(target, version, route)
        lane.share, lane.test = share, test
        self._canary[target] = lane

    def _end_canary(self, target: str) -> None:
        lane = self._canary.pop(target, None)
        if lane is not None:
            lane.share, lane.test = 1.0, None

    def _lane(self, target: str, version: str, route: Route) -> Lane:
        """The lane of a version, a new one unless it is there: a version never changes."""
        lane = self._find(target, version)
        if lane is None:
            lane = Lane(target, version, self._engine_for(replace(route, target=f"{target}@{version}")))
            self._lanes.append(lane)
        return lane

    def _find(self, target: str, version: str) -> Lane | None:
        return next((one for one in self._lanes if (one.target, one.version) == (target, version)), None)

    def _engine_for(self, route: Route) -> Engine:
        """The first engine that can host the route, with the route in it."""
        for engine in self._engines:
            with suppress(ValueError):
                engine.host(route)
                return engine
        engine = self._new_engine(route)
        self._engines.append(engine)
        return engine

    def _submit(self, target: str, request: Request, sink: Sink, version: str | None) -> None:
        lane, test = self._choose(target, request.id, version)
        if lane is None:
            sink(Progress("", unhosted=f"{target}@{version}"))
            return
        if self.failure is not None:
            sink(Progress(lane.version, failed=self.failure))
            return
        try:
            lane.engine.add(replace(request, target=lane.route))
        except ValueError as error:
            sink(Progress(lane.version, refused=str(error)))
            return
        lane.sinks[request.id] = sink
        may_draft = request.params.max_drafted != 0
        self._admitted[request.id] = Admitted(lane, test if may_draft else None, may_draft)

    def _choose(
        self, target: str, request_id: str, version: str | None
    ) -> tuple[Lane | None, WorseTest | None]:
        """The lane of a new request, and the test that it counts for if chance decided between two lanes.

        Of a request's choices only the first counts: they are of one prompt, and chance decided for all at once.
        """
        current, canary = self._current[target], self._canary.get(target)
        if version is not None:
            taking = (lane for lane in (current, canary) if lane is not None and lane.version == version)
            return next(taking, None), None
        if canary is None:
            return current, None
        asked, _, choice = request_id.partition("/")  # all choices of a request go the same way
        lane = canary if takes(canary.route, canary.share, asked) else current
        return lane, canary.test if choice in ("", FIRST_CHOICE) else None

    def _cancel(self, request_id: str) -> None:
        admitted = self._admitted.pop(request_id, None)
        if admitted is None:
            return
        lane = admitted.lane
        live = next((row for row in lane.engine.scheduler.live if row.request.id == request_id), None)
        if live is not None:  # a stop string ends a request here: it counts like one that ends by itself
            self._count(admitted, live.stats)
        del lane.sinks[request_id]
        lane.engine.cancel(request_id)

    def _count(self, admitted: Admitted, stats: DecodeStats) -> None:
        """Counts a finished request for its lane, and for the canary's test if it is still the same one."""
        if not stats.rounds or not admitted.may_draft:
            return
        lane = admitted.lane
        plain = stats.ended["undrafted"] >= UNDRAFTED * stats.rounds
        lane.plain_in_a_row = lane.plain_in_a_row + 1 if plain else 0
        canary = self._canary.get(lane.target)
        if canary is not None and admitted.test is not None and admitted.test is canary.test:
            canary.test.add(is_canary=lane is canary, emitted=stats.emitted, rounds=stats.rounds)

    def _end(self) -> None:
        self._stopping = True


def _settle(answer: "Future[T]", look: Callable[[], T]) -> None:
    """Gives the future what `look` returns or raises; nothing where it was cancelled, as by a client that left."""
    if not answer.set_running_or_notify_cancel():
        return
    try:
        answer.set_result(look())
    except Exception as error:  # noqa: BLE001 - who asked gets it; the engines are as they were
        answer.set_exception(error)


def _stop_token(completion: Completion | None) -> int | None:
    if completion is None or completion.finish_reason != "stop":
        return None
    return completion.tokens[-1]
