"""The hosted versions of targets: the engine of each, its open requests, and which of them a new request joins."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal

from farm.decode.engine import Engine, Route
from farm.decode.logprobs import TokenLogprob
from farm.decode.stats import DecodeStats
from serve.canary import WorseTest, takes

FIRST_CHOICE = "0"  # behind the slash of a choice's id, which begins with its request's
UNDRAFTED = 0.9  # share of a request's rounds from which on it counts as decoded plainly


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


class Lanes:
    """All lanes of a replica, and the engines that they share. Used by one thread.

    Targets share an engine, and with it every step, where their models have one shape; `new_engine` makes another one
    where they do not.
    """

    def __init__(self, new_engine: Callable[[Route], Engine]) -> None:
        self._new_engine = new_engine
        self.engines: list[Engine] = []
        self.all: list[Lane] = []
        self.current: dict[str, Lane] = {}  # by target, the one that takes its new requests
        self._canary: dict[str, Lane] = {}

    def host(self, target: str, version: str, route: Route) -> None:
        """Give new requests for `target` to this version; the one before finishes what it was given."""
        lane = self._lane(target, version, route)
        if self.current.get(target) is lane:
            return
        self.current[target] = lane
        canary = self._canary.get(target)
        if canary is lane:
            self.end_canary(target)
        elif canary is not None and canary.test is not None:
            canary.test = canary.test.again()  # what it is compared with is another one now

    def host_canary(self, target: str, version: str, route: Route, share: float, test: WorseTest) -> None:
        """Give a share of the new requests for a hosted target to this version, and judge it by `test`."""
        self.end_canary(target)
        lane = self._lane(target, version, route)
        lane.share, lane.test = share, test
        self._canary[target] = lane

    def end_canary(self, target: str) -> None:
        """Give all new requests to the current version; the canary finishes what it was given."""
        lane = self._canary.pop(target, None)
        if lane is not None:
            lane.share, lane.test = 1.0, None

    def choose(
        self, target: str, request_id: str, version: str | None
    ) -> tuple[Lane | None, WorseTest | None]:
        """The lane of a new request, and the test that it counts for if chance decided between two lanes.

        Of a request's choices only the first counts: they are of one prompt, and chance decided for all at once.
        """
        current, canary = self.current[target], self._canary.get(target)
        if version is not None:
            taking = (lane for lane in (current, canary) if lane is not None and lane.version == version)
            return next(taking, None), None
        if canary is None:
            return current, None
        asked, _, choice = request_id.partition("/")  # all choices of a request go the same way
        lane = canary if takes(canary.route, canary.share, asked) else current
        return lane, canary.test if choice in ("", FIRST_CHOICE) else None

    def count(self, admitted: Admitted, stats: DecodeStats) -> None:
        """Counts a finished request for its lane, and for the canary's test if it is still the same one."""
        if not stats.rounds or not admitted.may_draft:
            return
        lane = admitted.lane
        plain = stats.ended["undrafted"] >= UNDRAFTED * stats.rounds
        lane.plain_in_a_row = lane.plain_in_a_row + 1 if plain else 0
        canary = self._canary.get(lane.target)
        if canary is not None and admitted.test is not None and admitted.test is canary.test:
            canary.test.add(is_canary=lane is canary, emitted=stats.emitted, rounds=stats.rounds)

    def replaced(self) -> list[Lane]:
        """The lanes that take no new requests and have none open."""
        return [lane for lane in self.all if not lane.sinks and not self._takes_requests(lane)]

    def _takes_requests(self, lane: Lane) -> bool:
        return lane is self.current[lane.target] or lane is self._canary.get(lane.target)

    def drop(self, lane: Lane) -> None:
        """Forget a lane without requests; its engine forgets what it counted."""
        lane.engine.drop(lane.route)
        self.all = [one for one in self.all if one is not lane]

    def _lane(self, target: str, version: str, route: Route) -> Lane:
        """The lane of a version, a new one unless it is there: a version never changes."""
        lane = next((one for one in self.all if (one.target, one.version) == (target, version)), None)
        if lane is None:
            lane = Lane(target, version, self._engine_for(replace(route, target=f"{target}@{version}")))
            self.all.append(lane)
        return lane

    def _engine_for(self, route: Route) -> Engine:
        """The first engine that can host the route, with the route in it."""
        for engine in self.engines:
            with suppress(ValueError):
                engine.host(route)
                return engine
        engine = self._new_engine(route)
        self.engines.append(engine)
        return engine
