"""What the endpoint counts, for Prometheus: one table of names, one meter a process.

A meter keeps prometheus_client's counters: `/metrics` of the endpoint shows the gateway's own and those that it asks of
every replica. It writes the same to ray.util.metrics, which Ray exports on every node under the prefix `ray_`. Neither
would do alone: what is in ray.util.metrics cannot be read back, and prometheus_client knows only its own process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

from farm.decode.stats import DecodeStats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(frozen=True)
class Spec:
    """One metric. A counter's name gets `_total`, a histogram's `_bucket`, `_sum` and `_count` in what is exported."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ("target",)


# `target` is a hosted target, "" for a request that named none: what clients write never becomes a label.
REQUESTS = (
    Spec("farm_requests", "counter", "Requests by HTTP status; 499: the client left.", ("target", "status")),
    Spec("farm_requests_open", "gauge", "Requests between the first piece of their answer and the last."),
    Spec("farm_prompt_tokens", "counter", "Prompt tokens of answered requests."),
    Spec("farm_generation_tokens", "counter", "Tokens of answers.", ("target", "version")),
    Spec("farm_time_to_first_token_seconds", "histogram", "From the request's arrival to its first piece."),
    Spec("farm_inter_token_latency_seconds", "histogram", "Between one piece of an answer and the next."),
    Spec("farm_time_per_output_token_seconds", "histogram", "Of a request after its first token, a token."),
    Spec("farm_request_seconds", "histogram", "From a request's arrival to its end."),
)
_OF_VERSION = ("target", "version", "replica")
ENGINES = (
    Spec("farm_rounds", "counter", "Verification rounds; tau is emitted tokens over rounds.", _OF_VERSION),
    Spec("farm_emitted_tokens", "counter", "Tokens that rounds committed.", _OF_VERSION),
    Spec("farm_round_ends", "counter", "Rounds by why they gave no more tokens.", (*_OF_VERSION, "end")),
    Spec("farm_reached_tokens", "counter", "Drafted tokens judged, by position.", (*_OF_VERSION, "position")),
    Spec("farm_accepted_tokens", "counter", "Drafted tokens accepted, by position.", (*_OF_VERSION, "position")),
    Spec("farm_requests_running", "gauge", "Requests in a slot.", _OF_VERSION),
    Spec("farm_requests_waiting", "gauge", "Requests that wait for a slot.", _OF_VERSION),
    Spec("farm_slots", "gauge", "Sequences that can decode at once.", ("replica",)),
    Spec("farm_slots_in_use", "gauge", "Sequences that decode.", ("replica",)),
    Spec("farm_current_version", "gauge", "1 for the version that takes a target's new requests.", _OF_VERSION),
    Spec(
        "farm_canaries_rolled_back", "counter", "Times that this replica ended a canary.",
        ("target", "replica", "reason"),
    ),
    Spec("farm_adapter_swaps", "counter", "Times that another version took over.", ("target", "replica")),
    Spec(
        "farm_plain_fallbacks", "counter", "Times that a target went over to plain decoding.",
        ("target", "replica", "reason"),
    ),
)  # fmt: skip


def series_names(specs: Iterable[Spec]) -> set[str]:
    """The names of all series that the metrics are exported as."""
    endings = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
    return {spec.name + ending for spec in specs for ending in endings[spec.kind]}


class Meter:
    """The metrics of one process.

    Args:
        specs: what it counts.
        fixed: labels that are the same for all that it counts.
        mirror: ray.util.metrics, to export there too; None where there is no Ray.
    """

    def __init__(
        self, specs: Sequence[Spec], fixed: Mapping[str, str] | None = None, mirror: ModuleType | None = None
    ) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._fixed = dict(fixed or {})
        self._labels = {spec.name: spec.labels for spec in specs}
        self._own: dict[str, Any] = {}
        self._mirrored: dict[str, Any] = {}
        for spec in specs:
            extra = {"buckets": SECONDS} if spec.kind == "histogram" else {}
            made = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}[spec.kind]
            self._own[spec.name] = made(spec.name, spec.help, spec.labels, registry=self._registry, **extra)
            if mirror is not None:
                boundaries = {"boundaries": list(SECONDS)} if spec.kind == "histogram" else {}
                mirrored = getattr(mirror, spec.kind.capitalize())
                self._mirrored[spec.name] = mirrored(
                    spec.name, description=spec.help, tag_keys=spec.labels, **boundaries
                )

    def inc(self, name: str, amount: float = 1, **labels: str) -> None:
        """Adds to a counter; nothing for 0."""
        if amount > 0:
            self._do(name, "inc", amount, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self._do(name, "set", value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Adds one value to a histogram."""
        self._do(name, "observe", value, labels)

    def _do(self, name: str, verb: str, value: float, labels: dict[str, str]) -> None:
        every = {**labels, **self._fixed}
        values = {label: every[label] for label in self._labels[name]}
        getattr(self._own[name].labels(**values), verb)(value)
        if name in self._mirrored:
            getattr(self._mirrored[name], verb)(value, tags=values)

    def collect(self) -> list[Metric]:
        """All families with their samples; they can be sent to another process."""
        return list(self._registry.collect())


class _Collected:
    """A collector of families that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def exposition(processes: Iterable[Iterable[Metric]]) -> bytes:
    """Prometheus text of the families of several processes, each family once."""
    merged: dict[str, Metric] = {}
    for families in processes:
        for family in families:
            into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            into.samples += family.samples
    registry = CollectorRegistry()
    registry.register(_Collected(merged.values()))
    text: bytes = generate_latest(registry)
    return text


class _Lane(Protocol):
    """What of serve.lanes.Lane is read here."""

    target: str
    version: str
    engine: Any
    sinks: Mapping[str, Any]

    @property
    def route(self) -> str: ...


class EngineMeter(Meter):
    """Of one replica: what its engines counted since it was last asked, and how they stand."""

    def __init__(self, replica: str, mirror: ModuleType | None = None) -> None:
        super().__init__(ENGINES, {"replica": replica}, mirror)
        self._seen: dict[tuple[int, str], DecodeStats] = {}
        self._hosted: dict[str, str] = {}
        self._lanes: set[tuple[str, str]] = set()

    def hosted(self, target: str, version: str) -> None:
        """A version takes the target's new requests from now on."""
        before = self._hosted.get(target)
        if before is not None and before != version:
            self.inc("farm_adapter_swaps", target=target)
            self.set("farm_current_version", 0, target=target, version=before)
        self._hosted[target] = version
        self.set("farm_current_version", 1, target=target, version=version)

    def fell_back(self, target: str, reason: str) -> None:
        """A target is decoded plainly from now on; `reason` is one of few words."""
        self.inc("farm_plain_fallbacks", target=target, reason=reason)

    def rolled_back(self, target: str, reason: str) -> None:
        """This replica ended the target's canary; `reason` is one of few words."""
        self.inc("farm_canaries_rolled_back", target=target, reason=reason)

    def read(self, lanes: Iterable[_Lane]) -> None:
        """Takes over what the lanes' engines have counted; called between two steps of them."""
        lanes = list(lanes)
        engines = {id(lane.engine): lane.engine for lane in lanes}
        for number, engine in engines.items():
            for route, stats in engine.stats_of.items():
                self._add(number, route, stats)
        gone = self._lanes - {(lane.target, lane.version) for lane in lanes}
        self._lanes = {(lane.target, lane.version) for lane in lanes}
        for target, version in gone:
            self.set("farm_requests_running", 0, target=target, version=version)
            self.set("farm_requests_waiting", 0, target=target, version=version)
        for lane in lanes:
            running = sum(row.request.target == lane.route for row in lane.engine.scheduler.live)
            of = {"target": lane.target, "version": lane.version}
            self.set("farm_requests_running", running, **of)
            self.set("farm_requests_waiting", max(0, len(lane.sinks) - running), **of)
        self.set("farm_slots", sum(engine.scheduler.num_slots for engine in engines.values()))
        self.set("farm_slots_in_use", sum(engine.num_live for engine in engines.values()))

    def read_last(self, lane: _Lane) -> None:
        """Takes over what a lane's engine has counted of it before it forgets; a later one of its name begins at 0."""
        number = id(lane.engine)
        self._add(number, lane.route, lane.engine.stats_of.get(lane.route, DecodeStats()))
        self._seen.pop((number, lane.route), None)

    def _add(self, engine: int, route: str, stats: DecodeStats) -> None:
        before = self._seen.setdefault((engine, route), DecodeStats())
        if stats.rounds == before.rounds:
            return
        target, _, version = route.rpartition("@")
        of = {"target": target, "version": version}
        self.inc("farm_rounds", stats.rounds - before.rounds, **of)
        self.inc("farm_emitted_tokens", stats.emitted - before.emitted, **of)
        for end, count in stats.ended.items():
            self.inc("farm_round_ends", count - before.ended[end], **of, end=end)
        for name, counts, old in (
            ("farm_reached_tokens", stats.reached, before.reached),
            ("farm_accepted_tokens", stats.accepted, before.accepted),
        ):
            for i, count in enumerate(counts):
                new = count - (old[i] if i < len(old) else 0)
                self.inc(name, new, **of, position=str(i))
        seen = DecodeStats()
        seen.add(stats)
        self._seen[engine, route] = seen
