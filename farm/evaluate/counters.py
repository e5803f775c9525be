"""Speculative decoding of a running server, read from its Prometheus counters: no model, no torch.

The server is this project's endpoint, vLLM or SGLang. The endpoint counts which drafted tokens were judged and which
were accepted, by position, so that survival is known although rounds draft different lengths. vLLM counts rounds,
drafted tokens and accepted tokens by position. SGLang counts tokens and verifications of finished requests, and none by
position: there, survival is that of one acceptance at every position which gives the same tau.
"""

from __future__ import annotations

import math
import operator
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from urllib.parse import urlsplit, urlunsplit

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from farm.decode.control import Load, RoundResult
from farm.decode.costs import RoundCosts
from farm.errors import UserError
from farm.evaluate.triage import Seen

FARM, VLLM, SGLANG = "farm_", "vllm:", "sglang:"
TIMEOUT_S = 10.0
# Histograms of the seconds of one output token; vLLM's inter-token latency is that of a whole round.
FARM_TOKEN_SECONDS = ("farm_time_per_output_token_seconds",)
VLLM_TOKEN_SECONDS = ("vllm:request_time_per_output_token_seconds",)
SGLANG_TOKEN_SECONDS = ("sglang:request_time_per_output_token_seconds", "sglang:inter_token_latency_seconds")


@dataclass(frozen=True)
class StepCosts:
    """Of one drafted token, as shares of a plain decoding step: its draft step, and its share of the verification."""

    draft: float = 0.1
    verify: float = 0.02

    def round(self, length: int) -> float:
        """A round that drafts `length` tokens, in plain steps."""
        return 1 + length * (self.draft + self.verify)


@dataclass(frozen=True)
class Counters:
    """What one served model's counters say, since its engine started or over the time that was watched."""

    model: str
    engine: str
    rounds: float
    tau: float  # 1 + accepted / rounds, the next token included
    survival: tuple[float, ...]  # by draft position
    by_position: bool  # whether survival was counted, or follows from tau
    steady: bool  # whether every round drafted to the last position; else survival is a lower bound
    token_s: float | None  # seconds an output token of one request; None: the engine does not say

    @property
    def k(self) -> int:
        """Most tokens that a round drafted."""
        return len(self.survival)

    def seen(self, costs: StepCosts, token_s: float | None, batch: int) -> Seen:
        """What triage needs to know; `token_s` stands in for the engine's own, `batch` requests share the machine."""
        seconds = self.token_s if token_s is None else token_s
        if seconds is None:
            return Seen(self.tau, alpha=self.alpha)
        round_s = seconds * self.tau / batch
        return Seen(self.tau, round_s / costs.round(self.k), round_s, alpha=self.alpha)

    @property
    def alpha(self) -> float:
        """Accepted share of the drafted tokens that were reached."""
        return sum(self.survival) / (1 + sum(self.survival[:-1]))


def read_counters(url: str, watch_s: float = 0.0) -> tuple[Counters, ...]:
    """The counters behind a server's URL (`/metrics` is added), one record a served model.

    `watch_s` leaves out what was counted before now, and waits so many seconds. Raises UserError when the server cannot
    be reached, or does not decode speculatively.
    """
    before = ""
    if watch_s:
        before = _fetch(url)
        time.sleep(watch_s)
    return parse_counters(_fetch(url), url, before)


def parse_counters(text: str, source: str, before: str = "") -> tuple[Counters, ...]:
    """The same from an exposition's text, less what an earlier one had counted; `source` is named in errors."""
    try:
        earlier = {_series(sample): sample.value for sample in _samples(before, growing=True)}
        samples = [
            sample._replace(value=sample.value - earlier.get(_series(sample), 0.0))
            for sample in _samples(text, growing=False)
        ]
    except ValueError as error:
        raise UserError(
            f"{source}: is not Prometheus text ({error}); give the URL of an endpoint, vLLM or SGLang"
        ) from None
    found = (*_farm(samples), *_vllm(samples), *_sglang(samples))
    if not found:
        raise UserError(
            f"{source}: counts no round of speculative decoding; start vLLM with --speculative-config, or SGLang with "
            "--speculative-algorithm and --enable-metrics, and let it answer requests first"
        )
    return found


def _samples(text: str, *, growing: bool) -> Iterator[Sample]:
    """All samples, or only those of counters and histograms: a gauge is what it is."""
    for family in text_string_to_metric_families(text):
        if not growing or family.type in ("counter", "histogram"):
            yield from family.samples


def _series(sample: Sample) -> tuple[str, frozenset[tuple[str, str]]]:
    return sample.name, frozenset(sample.labels.items())


def best_length(survival: Sequence[float], costs: StepCosts) -> tuple[int, float]:
    """The draft length of most tokens a second by these costs, and its speed over plain decoding."""
    load, known = Load(("served",), (len(survival),)), RoundCosts(len(survival))
    for length in range(len(survival) + 1):
        drafted_s = length * costs.draft
        known.add(
            RoundResult(load, (length,), (0,), (1,), length, drafted_s, costs.round(length) - drafted_s)
        )
    length, rate = known.best(load, survival)
    return length, rate / known.plain(load)


def even_survival(tau: float, length: int) -> tuple[float, ...]:
    """Survival by position when each position is accepted with the one probability that gives `tau`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_powers(middle, length)) < tau - 1 else (low, middle)
    return tuple(_powers(high, length))


def tau_of_alpha(alpha: float, length: int) -> float:
    """Tokens a round when every position is accepted with probability `alpha`."""
    return 1 + sum(_powers(alpha, length))


def _powers(alpha: float, length: int) -> Iterator[float]:
    return (alpha**position for position in range(1, length + 1))


def _fetch(url: str) -> str:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UserError(f"--metrics {url}: is no http address; write for instance http://localhost:8000")
    address = urlunsplit(parts if parts.path.strip("/") else parts._replace(path="/metrics"))
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_S) as answer:
            content: bytes = answer.read()
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise UserError(f"--metrics {address}: cannot be read ({error}); is the server running?") from None
    return content.decode("utf-8", errors="replace")


def _farm(samples: Sequence[Sample]) -> Iterator[Counters]:
    for target, own in _by_model(samples, FARM, "target"):
        undrafted = sum(
            sample.value
            for sample in own
            if sample.name == "farm_round_ends_total" and sample.labels["end"] == "undrafted"
        )
        rounds = _total(own, "farm_rounds_total") - undrafted
        if rounds <= 0:
            continue
        reached = _by_position(own, "farm_reached_tokens_total")
        accepted = _by_position(own, "farm_accepted_tokens_total")
        alphas = [accepted.get(position, 0.0) / count for position, count in sorted(reached.items()) if count]
        yield Counters(
            model=target, engine="farm", rounds=rounds,
            tau=(_total(own, "farm_emitted_tokens_total") - undrafted) / rounds,
            survival=tuple(accumulate(alphas, operator.mul)), by_position=True,
            steady=True, token_s=_token_seconds(own, FARM_TOKEN_SECONDS),
        )  # fmt: skip


def _vllm(samples: Sequence[Sample]) -> Iterator[Counters]:
    for model, own in _by_model(samples, VLLM):
        rounds = _total(own, "vllm:spec_decode_num_drafts_total")
        if not rounds:
            continue
        accepted = _total(own, "vllm:spec_decode_num_accepted_tokens_total")
        drafted = _total(own, "vllm:spec_decode_num_draft_tokens_total")
        places = _by_position(own, "vllm:spec_decode_num_accepted_tokens_per_pos_total")
        tau, length = 1 + accepted / rounds, len(places) or max(1, math.ceil(drafted / rounds))
        counted = tuple(places[position] / rounds for position in sorted(places))
        yield Counters(
            model=model, engine="vLLM", rounds=rounds, tau=tau,
            survival=counted or even_survival(tau, length), by_position=bool(counted),
            steady=drafted > (length - 0.01) * rounds, token_s=_token_seconds(own, VLLM_TOKEN_SECONDS),
        )  # fmt: skip


def _sglang(samples: Sequence[Sample]) -> Iterator[Counters]:
    for model, own in _by_model(samples, SGLANG):
        rounds = _total(own, "sglang:spec_verify_calls_total")
        # A request's first token comes from its prefill.
        emitted = _total(own, "sglang:generation_tokens_total") - _total(own, "sglang:num_requests_total")
        lately = _mean(own, "sglang:spec_accept_length")
        tau = emitted / rounds if rounds else lately
        if not tau or tau < 1:
            continue
        length = round(_mean(own, "sglang:spec_num_steps")) or max(1, math.ceil(tau - 1))
        yield Counters(
            model=model, engine="SGLang", rounds=rounds, tau=tau, survival=even_survival(tau, length),
            by_position=False, steady=True, token_s=_token_seconds(own, SGLANG_TOKEN_SECONDS),
        )  # fmt: skip


def _by_position(samples: Iterable[Sample], name: str) -> dict[int, float]:
    places: defaultdict[int, float] = defaultdict(float)
    for sample in samples:
        if sample.name == name:
            places[int(sample.labels["position"])] += sample.value
    return places


def _by_model(
    samples: Iterable[Sample], prefix: str, label: str = "model_name"
) -> list[tuple[str, list[Sample]]]:
    grouped: defaultdict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.name.startswith(prefix):
            grouped[sample.labels.get(label, "")].append(sample)
    return sorted(grouped.items())


def _total(samples: Iterable[Sample], name: str) -> float:
    """Over the engines, ranks and kinds of request of one model."""
    return sum(sample.value for sample in samples if sample.name == name)


def _mean(samples: Iterable[Sample], name: str) -> float:
    """Of a gauge over the engines that have set it; 0 if none has."""
    values = [sample.value for sample in samples if sample.name == name and sample.value > 0]
    return sum(values) / len(values) if values else 0.0


def _token_seconds(samples: Sequence[Sample], names: Iterable[str]) -> float | None:
    """The mean of the first histogram that has an observation."""
    for name in names:
        observations = _total(samples, f"{name}_count")
        if observations:
            return _total(samples, f"{name}_sum") / observations
    return None
