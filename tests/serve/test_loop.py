"""The engine thread: targets advance together, versions change under load, nobody waits for ever."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.layers.dense import Dense
from farm.target.forward import TargetForward
from serve.canary import WorseTest
from serve.lanes import Progress
from serve.loop import EngineLoop
from tests.serve.family import tiny_model, tiny_tokenizer


class Mailbox(queue.Queue[Progress]):
    def rest(self) -> list[Progress]:
        """Everything up to the last progress of the request."""
        found = [self.get(timeout=10)]
        while not (found[-1].finish_reason or found[-1].refused or found[-1].failed):
            found.append(self.get(timeout=10))
        return found


def route(seed: int = 0, num_layers: int = 2) -> Route:
    return Route(TargetForward.of(tiny_model(tiny_tokenizer(), seed, num_layers).eval()), frozenset())


def engine(route: Route) -> Engine:
    return Engine([route], num_slots=2, max_length=128, k=0)


def ask(name: str, tokens: int = 20) -> Request:
    return Request(name, (10, 20, 30), SamplingParams(max_new_tokens=tokens))


@pytest.fixture
def loop() -> Iterator[EngineLoop]:
    loop = EngineLoop(engine)
    loop.host("a", "v1", route(0))
    loop.host("b", "base", route(1))
    loop.start()
    yield loop
    loop.stop(wait_s=10)
    assert not loop.is_alive


def test_requests_of_two_targets_get_what_their_own_engine_gives(loop):
    boxes = {name: Mailbox() for name in "ab"}
    for name, box in boxes.items():
        loop.submit(name, ask(name), box.put)
    for seed, (name, box) in enumerate(boxes.items()):
        (expected,) = engine(route(seed)).run([ask(name)])
        assert tuple(token for progress in box.rest() for token in progress.tokens) == expected.tokens


def test_a_request_keeps_the_version_it_was_given_to_and_the_old_engine_goes(loop):
    old, new = Mailbox(), Mailbox()
    loop.submit("a", ask("old", 100), old.put)
    assert old.get(timeout=10).version == "v1"
    loop.host("a", "v2", route(2))
    loop.submit("a", ask("new"), new.put)
    assert {progress.version for progress in new.rest()} == {"v2"}
    assert {progress.version for progress in old.rest()} == {"v1"}
    versions = loop.inspect(lambda lanes, current: sorted(lane.version for lane in lanes))
    assert versions.result(timeout=10) == ["base", "v2"]


def test_a_cancelled_request_gives_its_slot_to_one_that_waits(loop):
    boxes = [Mailbox() for _ in range(3)]
    for number, box in enumerate(boxes):
        loop.submit("a", ask(str(number), 120), box.put)
    loop.cancel("0")
    assert boxes[2].rest()[-1].finish_reason == "length"
    left = loop.inspect(lambda lanes, current: sum(len(lane.sinks) for lane in lanes if lane.target == "a"))
    assert left.result(timeout=10) <= 1


def test_a_request_that_the_engine_refuses_is_told_and_stops_no_other(loop):
    refused, fine = Mailbox(), Mailbox()
    loop.submit("a", Request("long", tuple(range(200)), SamplingParams()), refused.put)
    loop.submit("a", ask("fine"), fine.put)
    assert "leave no room" in (refused.rest()[-1].refused or "")
    assert fine.rest()[-1].finish_reason == "length"


def test_a_broken_engine_tells_its_own_requests_and_later_ones():
    broken = route()
    broken.forward.head = Dense.of(torch.zeros(3, 5))  # any forward raises from now on
    loop = EngineLoop(engine)
    loop.host("a", "v1", broken)
    loop.start()
    first, later = Mailbox(), Mailbox()
    loop.submit("a", ask("first"), first.put)
    assert first.rest()[-1].failed
    loop.stop(wait_s=10)
    assert not loop.is_alive
    loop.submit("a", ask("later"), later.put)
    assert later.rest()[-1].failed


def test_a_request_that_is_cancelled_when_the_engine_breaks_keeps_no_other_from_being_told():
    broken = route()
    broken.forward.head = Dense.of(torch.zeros(3, 5))
    loop = EngineLoop(engine)
    loop.host("a", "v1", broken)
    first, second = Mailbox(), Mailbox()

    def leave(progress: Progress) -> None:
        first.put(progress)
        loop.cancel("first")
        loop.inspect(lambda lanes, current: None)

    loop.submit("a", ask("first"), leave)
    loop.submit("a", ask("second"), second.put)
    loop.start()
    assert first.rest()[-1].failed
    assert second.rest()[-1].failed
    loop.stop(wait_s=10)


def test_targets_of_one_shape_share_an_engine_and_another_shape_gets_its_own(loop):
    loop.host("deep", "v1", route(3, num_layers=3))
    engines = loop.inspect(lambda lanes, current: {name: id(lane.engine) for name, lane in current.items()})
    of_target = engines.result(timeout=10)
    assert of_target["a"] == of_target["b"] != of_target["deep"]
    boxes = {name: Mailbox() for name in ("a", "deep")}
    for name, box in boxes.items():
        loop.submit(name, ask(name), box.put)
    assert {name: box.rest()[-1].finish_reason for name, box in boxes.items()} == dict.fromkeys(
        boxes, "length"
    )


def test_going_back_to_a_version_that_still_decodes_gives_it_new_requests(loop):
    old, again = Mailbox(), Mailbox()
    first = route(0)
    loop.host("a", "v2", first)
    loop.submit("a", ask("old", 100), old.put)
    loop.host("a", "v3", route(4))
    loop.host("a", "v2", first)
    loop.submit("a", ask("again"), again.put)
    assert {progress.version for progress in again.rest()} == {"v2"}
    assert old.rest()[-1].finish_reason == "length"


def test_a_pinned_version_is_answered_by_it_or_not_at_all(loop):
    pinned, gone = Mailbox(), Mailbox()
    loop.submit("a", ask("pinned"), pinned.put, "v1")
    assert {progress.version for progress in pinned.rest()} == {"v1"}
    loop.host("a", "v2", route(2))
    loop.submit("a", ask("gone"), gone.put, "v1")
    assert gone.get(timeout=10).unhosted == "a@v1"


def test_log_probabilities_come_with_their_tokens(loop):
    box = Mailbox()
    loop.submit("a", replace(ask("r"), params=SamplingParams(max_new_tokens=9, logprobs=1)), box.put)
    found = box.rest()
    assert [one.token for progress in found for one in progress.logprobs] == [
        token for progress in found for token in progress.tokens
    ]


def test_requests_that_were_decoded_plainly_are_counted_until_one_drafts(loop):
    for number in range(3):
        box = Mailbox()
        loop.submit("a", ask(str(number)), box.put)
        box.rest()
    asked = Mailbox()
    plainly = SamplingParams(max_new_tokens=4, max_drafted=0)
    loop.submit("b", Request("by choice", (10, 20, 30), plainly), asked.put)
    asked.rest()
    counts = loop.inspect(
        lambda lanes, current: {name: lane.plain_in_a_row for name, lane in current.items()}
    )
    assert counts.result(timeout=10) == {"a": 3, "b": 0}


def test_a_look_that_is_cancelled_or_raises_ends_no_request(loop):
    """As when the client that asked has left: the commands are still in the queue."""
    box = Mailbox()
    loop.submit("a", ask("open", 100), box.put)
    assert box.get(timeout=10).tokens

    def fail(lanes, current):
        raise LookupError("no such lane")

    blocked = threading.Event()
    loop.inspect(lambda lanes, current: blocked.wait(10))
    left = loop.inspect(lambda lanes, current: None)
    assert left.cancel()
    failed = loop.inspect(fail)
    blocked.set()
    with pytest.raises(LookupError, match="no such lane"):
        failed.result(timeout=10)
    assert box.rest()[-1].finish_reason == "length"
    assert loop.is_alive


def test_the_choices_of_a_request_are_one_in_the_canarys_test(loop):
    loop.host_canary("a", "v2", route(2), 0.5, WorseTest(0.5, 0, 0.05, 0.05))
    boxes = {f"{name}/{index}": Mailbox() for name in ("p", "q", "r") for index in range(3)}
    for name, box in boxes.items():
        loop.submit("a", ask(name), box.put)
    versions = {name: {progress.version for progress in box.rest()} for name, box in boxes.items()}
    assert all(versions[f"{name}/0"] == versions[f"{name}/2"] for name in ("p", "q", "r"))
    tests = loop.inspect(lambda lanes, current: [lane.test for lane in lanes if lane.test])
    (test,) = tests.result(timeout=10)
    assert (test.canary.requests, test.live.requests) == (1, 2)  # as chance has it for these names


def test_a_replica_that_failed_before_its_engines_started_stops_without_another_error():
    failed = EngineLoop(engine)
    failed.stop(wait_s=1.0)
    assert not failed.is_alive
