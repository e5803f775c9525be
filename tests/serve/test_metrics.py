"""Counters must be those of the engine, to the token, and what a client writes must not become a label."""

import asyncio
import json
import logging
import queue
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.decode.stats import DecodeStats
from farm.evaluate.counters import parse_counters
from farm.target.forward import TargetForward
from serve.errors import ErrorBody
from serve.lanes import Lane, Progress
from serve.loop import EngineLoop
from serve.metrics import ENGINES, REQUESTS, EngineMeter, Meter, exposition, series_names
from serve.records import Ask, Delta, Item
from serve.request_log import RequestMeter, log
from tests.serve.family import tiny_model, tiny_tokenizer

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples(text: bytes) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def value(found: Samples, name: str, **labels: str) -> float:
    """The sum over the series that have these labels."""
    return sum(v for (n, of), v in found.items() if n == name and labels.items() <= dict(of).items())


class Lanes:
    """An engine's lanes as the meter reads them, with counts of our own."""

    def __init__(self) -> None:
        forward = TargetForward.of(tiny_model(tiny_tokenizer(), 0).eval())
        self.engine = Engine([Route(forward, frozenset(), target="a@v1")], num_slots=2, max_length=64, k=0)
        self.stats = self.engine.stats_of.setdefault("a@v1", DecodeStats())

    def __iter__(self) -> Iterator[Lane]:
        return iter([Lane("a", "v1", self.engine)])


@pytest.fixture(scope="module")
def lanes() -> Lanes:
    return Lanes()


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.booleans()).map(
            lambda drawn: (drawn[0], min(drawn[:2]), drawn[2])
        ),
        max_size=30,
    )
)
def test_counters_are_the_engines_counts_however_often_it_is_read(lanes, rounds):
    lanes.stats.__init__()
    meter = EngineMeter("r1")
    for number, (drafted, accepted, read) in enumerate(rounds):
        lanes.stats.count(drafted, accepted, accepted + 1)
        if read or number == len(rounds) - 1:
            meter.read(lanes)
    found = samples(exposition([meter.collect()]))
    assert value(found, "farm_rounds_total", target="a", version="v1", replica="r1") == lanes.stats.rounds
    assert value(found, "farm_emitted_tokens_total") == lanes.stats.emitted
    for i, (reached, accepted) in enumerate(zip(lanes.stats.reached, lanes.stats.accepted, strict=True)):
        assert value(found, "farm_reached_tokens_total", position=str(i)) == reached
        assert value(found, "farm_accepted_tokens_total", position=str(i)) == accepted
    for end, count in lanes.stats.ended.items():
        assert value(found, "farm_round_ends_total", end=end) == count
    if any(drafted for drafted, _, _ in rounds):
        (counters,) = parse_counters(exposition([meter.collect()]).decode(), "here")
        plain = lanes.stats.ended["undrafted"]
        assert counters.tau == pytest.approx((lanes.stats.emitted - plain) / (lanes.stats.rounds - plain))
        assert counters.survival[0] == pytest.approx(lanes.stats.accepted[0] / lanes.stats.reached[0])


def test_a_family_of_several_replicas_is_declared_once_and_keeps_all_samples():
    meters = [EngineMeter("r1"), EngineMeter("r2")]
    for number, meter in enumerate(meters):
        meter.inc("farm_rounds", number + 1, target="a", version="v1")
    text = exposition(meter.collect() for meter in meters)
    assert text.count(b"# TYPE farm_rounds_total") == 1
    assert value(samples(text), "farm_rounds_total") == 3
    assert value(samples(text), "farm_rounds_total", replica="r2") == 2


def test_slots_and_waiting_requests_are_seen_between_steps():
    forward = TargetForward.of(tiny_model(tiny_tokenizer(), 0).eval())
    loop = EngineLoop(lambda route: Engine([route], num_slots=2, max_length=4000, k=0))
    loop.host("a", "v1", Route(forward, frozenset()))
    loop.start()
    for number in range(5):
        loop.submit("a", Request(str(number), (1, 2), SamplingParams(max_new_tokens=3000)), lambda _: None)
    meter = EngineMeter("r1")
    loop.inspect(lambda lanes, _: None).result(timeout=10)  # the step after it prefills
    loop.inspect(lambda lanes, _: meter.read(lanes)).result(timeout=10)
    found = samples(exposition([meter.collect()]))
    assert (value(found, "farm_slots"), value(found, "farm_slots_in_use")) == (2, 2)
    assert value(found, "farm_requests_running", target="a", version="v1") == 2
    assert value(found, "farm_requests_waiting", target="a", version="v1") == 3
    for number in range(5):
        loop.cancel(str(number))
    loop.host("a", "v2", Route(forward, frozenset()))
    loop.inspect(lambda lanes, _: None).result(timeout=10)
    loop.inspect(lambda lanes, _: meter.read(lanes)).result(timeout=10)
    found = samples(exposition([meter.collect()]))
    assert value(found, "farm_requests_running") == value(found, "farm_requests_waiting") == 0
    loop.stop(wait_s=10)


def test_versions_that_come_and_go_leave_nothing_but_their_counters():
    """What was counted after the last scrape must not be lost. An answer's first token is the prefill's."""
    forward = TargetForward.of(tiny_model(tiny_tokenizer(), 0).eval())
    meter = EngineMeter("r1")
    loop = EngineLoop(lambda route: Engine([route], num_slots=2, max_length=64, k=0), meter.read_last)
    loop.start()
    emitted = []
    for number in range(7):
        version = f"v{number % 3}"  # v0 comes back
        loop.host("a", version, Route(forward, frozenset()))
        done = queue.Queue()
        request = Request(str(number), (1, 2), SamplingParams(max_new_tokens=5 + number))
        loop.submit("a", request, lambda got, done=done: done.put(got))
        while done.get(timeout=10).finish_reason is None:
            pass
        if number % 2:
            loop.inspect(lambda lanes, _: meter.read(lanes)).result(timeout=10)
        emitted.append(value(samples(exposition([meter.collect()])), "farm_emitted_tokens_total"))
    loop.inspect(lambda lanes, _: meter.read(lanes)).result(timeout=10)
    loop.stop(wait_s=10)
    (engine,) = loop._lanes.engines
    found = samples(exposition([meter.collect()]))
    assert emitted == sorted(emitted)
    assert value(found, "farm_emitted_tokens_total") == engine.stats.emitted == sum(4 + n for n in range(7))
    assert value(found, "farm_emitted_tokens_total", target="a", version="v0") == 4 + 7 + 10
    assert engine.stats_of.keys() == {"a@v0"} == {route for _, route in meter._seen}


def test_another_version_is_a_swap_and_the_first_is_none():
    meter = EngineMeter("r1")
    meter.hosted("a", "base")
    assert value(samples(exposition([meter.collect()])), "farm_adapter_swaps_total") == 0
    meter.hosted("a", "v1")
    meter.fell_back("b", "trunk")
    meter.rolled_back("b", "unreadable")
    found = samples(exposition([meter.collect()]))
    assert value(found, "farm_adapter_swaps_total", target="a") == 1
    assert value(found, "farm_current_version", target="a", version="base") == 0
    assert value(found, "farm_current_version", target="a", version="v1") == 1
    assert value(found, "farm_plain_fallbacks_total", target="b", reason="trunk") == 1
    assert value(found, "farm_canaries_rolled_back_total", target="b", reason="unreadable") == 1


def ask(target: str = "a") -> Ask:
    secret = ({"role": "user", "content": "SECRET"},)
    return Ask("chatcmpl-1", target, secret, "", {}, None, None, ())


async def give(*items: Item) -> AsyncGenerator[Item, None]:
    for item in items:
        yield item


def watched(meter: RequestMeter, asked: Ask, items: tuple[Item, ...], take: int = 100) -> list[Item]:
    """What comes through; the client leaves after `take` items."""

    async def run() -> list[Item]:
        stream, got = meter.watch(asked, give(*items)), []
        async for item in stream:
            got.append(item)
            if len(got) == take:
                break
        await stream.aclose()
        return got

    return asyncio.run(run())


PIECES = (
    Delta("he", None, 3, 1, "v1"),
    Delta("llo", None, 3, 4, "v1", num_rounds=1, num_emitted=3),
    Delta("", "stop", 3, 6, "v1", num_rounds=2, num_emitted=6),
)


def test_a_request_is_counted_and_logged_once_without_what_it_says(caplog):
    meter = RequestMeter(Meter(REQUESTS))
    log.propagate = True
    with caplog.at_level(logging.INFO, "farm.requests"):
        assert watched(meter, replace(ask(), version="v1"), PIECES) == list(PIECES)
    (line,) = (json.loads(record.message) for record in caplog.records)
    assert (line["target"], line["version"], line["status"]) == ("a", "v1", 200)
    assert (line["prompt_tokens"], line["tokens"], line["tau"]) == (3, 6, 3.0)
    assert line["duration_ms"] >= line["ttft_ms"] >= 0
    found = samples(exposition([meter.meter.collect()]))
    assert "SECRET" not in caplog.text
    assert value(found, "farm_requests_total", target="a", status="200") == 1
    assert value(found, "farm_generation_tokens_total", target="a", version="v1") == 6
    assert value(found, "farm_time_to_first_token_seconds_count", target="a") == 1
    assert value(found, "farm_inter_token_latency_seconds_count", target="a") == 2
    assert value(found, "farm_requests_open", target="a") == 0


def test_the_choices_of_one_request_are_counted_together_and_it_ends_with_the_last_of_them(caplog):
    meter, log.propagate = RequestMeter(Meter(REQUESTS)), True
    other = tuple(replace(piece, index=1) for piece in PIECES)
    with caplog.at_level(logging.INFO, "farm.requests"):
        watched(meter, replace(ask(), num_choices=2), (*PIECES, *other))
        watched(meter, replace(ask(), num_choices=2), PIECES)
    whole, cut = (json.loads(record.message) for record in caplog.records)
    assert (whole["status"], whole["tokens"], whole["prompt_tokens"], whole["tau"]) == (200, 12, 3, 3.0)
    assert cut["status"] == 499


@pytest.mark.parametrize(
    ("items", "take", "status"),
    [
        (PIECES, 2, "499"),
        ((PIECES[0], ErrorBody(status=503, message="lost")), 100, "503"),
        ((ErrorBody(status=429, message="busy"),), 100, "429"),
    ],
)
def test_a_request_that_does_not_end_well_has_the_status_of_its_end(items, take, status):
    meter = RequestMeter(Meter(REQUESTS))
    watched(meter, ask(), items, take)
    found = samples(exposition([meter.meter.collect()]))
    assert value(found, "farm_requests_total") == value(found, "farm_requests_total", status=status) == 1
    assert value(found, "farm_requests_open") == 0


def test_names_that_clients_make_up_are_no_labels():
    meter = RequestMeter(Meter(REQUESTS))
    for number in range(50):
        watched(meter, ask(f"made-up-{number}"), (ErrorBody(status=404, message="unknown"),))
    found = samples(exposition([meter.meter.collect()]))
    assert {dict(of)["target"] for _, of in found if "target" in dict(of)} == {""}
    assert value(found, "farm_requests_total", target="", status="404") == 50


def test_the_dashboard_asks_only_for_metrics_that_there_are_and_operate_md_names_them_all():
    import re

    dashboard = json.loads(Path("docs/grafana.json").read_text())
    assert {"title", "panels", "schemaVersion", "templating", "uid"} <= dashboard.keys()
    known = series_names((*REQUESTS, *ENGINES))
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    asked = set()
    for panel in panels:
        assert panel["targets"]
        for target in panel["targets"]:
            names = set(re.findall(r"\$\{prefix\}(\w+)", target["expr"]))
            assert names
            asked |= {f"farm_{name}" for name in names}
    assert asked <= known
    operate = Path("docs/operate.md").read_text()
    assert [spec.name for spec in (*REQUESTS, *ENGINES) if f"`{spec.name}" not in operate] == []


def test_which_tokens_of_a_round_were_drafted_comes_with_its_text():
    from serve.choices import Choice, Mail, answer
    from serve.detokenize import TextStream

    tokenizer = tiny_tokenizer()
    ids = tokenizer("the quick brown fox")["input_ids"]

    async def run(include_rounds: bool) -> list[Item]:
        mailbox: asyncio.Queue[Mail] = asyncio.Queue()
        mailbox.put_nowait((0, Progress("v1", tuple(ids[:1]))))
        choice = Choice(0, TextStream(tokenizer.decode), None, tells_rounds=include_rounds)
        items = answer(mailbox, [choice], 7)
        got = [await anext(items)]
        mailbox.put_nowait((0, Progress("v1", tuple(ids[1:3]), 1)))
        mailbox.put_nowait((0, Progress("v1", tuple(ids[3:]), len(ids) - 3, "stop")))
        return [*got, *[item async for item in items]]

    first, last = asyncio.run(run(include_rounds=True))
    assert first.spans == ((first.text, False),)
    # A stop token is unseen.
    assert (last.num_rounds, last.num_emitted, last.num_new_tokens) == (2, len(ids), len(ids))
    assert first.text + "".join(text for text, _ in last.spans) == tokenizer.decode(ids)
    assert [drafted for _, drafted in last.spans] == [True, False, True]
    assert last.spans[1][0] == tokenizer.decode(ids[2:3])
    assert {item.spans for item in asyncio.run(run(include_rounds=False))} == {()}
