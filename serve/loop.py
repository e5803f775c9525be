"""One thread that owns the engines: they are not thread-safe, and a forward would block an event loop."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from farm.decode.engine import Completion, Engine, Output, Request, Route
from serve.canary import WorseTest
from serve.lanes import Admitted, Lane, Lanes, Progress, Sink

log = logging.getLogger("ray.serve")
T = TypeVar("T")


class EngineLoop:
    """Steps the engines that have work, in turn. Every public method may be called from any thread.

    A sink is called from this thread and must return at once. If an engine raises, the thread ends, every open request
    is told, and `failure` says why. A lane whose last request is done is given to `before_drop`, from this thread,
    before its engine forgets what it counted.
    """

    def __init__(
        self, new_engine: Callable[[Route], Engine], before_drop: Callable[[Lane], None] = lambda _: None
    ) -> None:
        self._lanes, self._before_drop = Lanes(new_engine), before_drop
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self.failure: str | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._admitted: dict[str, Admitted] = {}  # by request
        self._stopping = False

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def host(self, target: str, version: str, route: Route) -> None:
        """Give new requests for `target` to this version; the one before finishes what it was given."""
        self._commands.put(partial(self._lanes.host, target, version, route))

    def host_canary(self, target: str, version: str, route: Route, share: float, test: WorseTest) -> None:
        """Give a share of the new requests for a hosted target to this version, and judge it by `test`."""
        self._commands.put(partial(self._lanes.host_canary, target, version, route, share, test))

    def end_canary(self, target: str) -> None:
        """Give all new requests to the current version; the canary finishes what it was given."""
        self._commands.put(partial(self._lanes.end_canary, target))

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
        self._command(lambda: _settle(answer, lambda: look(self._lanes.all, self._lanes.current)))
        return answer

    def stop(self, wait_s: float = 0.0) -> None:
        """End the thread after the present step; open requests are told."""
        self._commands.put(self._end)
        if self._thread.is_alive():  # not of a replica that failed while it loaded
            self._thread.join(wait_s)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._obey()
                for engine in self._lanes.engines:
                    if engine.has_work:
                        self._deliver(engine.step())
                self._drop_replaced()
            self.failure = "stopped"
        except Exception as error:
            log.exception("the engine thread ends")
            self.failure = f"{type(error).__name__}: {error}"
        finally:
            # Whoever gives a command now has it obeyed in his own thread, which may end other requests meanwhile.
            for lane in list(self._lanes.all):
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
        idle = not any(engine.has_work for engine in self._lanes.engines)
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
                self._lanes.count(self._admitted.pop(output.request_id), output.completion.stats)
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
        for lane in self._lanes.replaced():
            self._before_drop(lane)
            self._lanes.drop(lane)
            log.info("%s: its last request is done, it is dropped", lane.route)

    def _submit(self, target: str, request: Request, sink: Sink, version: str | None) -> None:
        lane, test = self._lanes.choose(target, request.id, version)
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

    def _cancel(self, request_id: str) -> None:
        admitted = self._admitted.pop(request_id, None)
        if admitted is None:
            return
        lane = admitted.lane
        live = next((row for row in lane.engine.scheduler.live if row.request.id == request_id), None)
        if live is not None:  # a stop string ends a request here: it counts like one that ends by itself
            self._lanes.count(admitted, live.stats)
        del lane.sinks[request_id]
        lane.engine.cancel(request_id)

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
