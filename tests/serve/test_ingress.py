"""The gateway's part of a request, with a handle that is none of Serve's."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from serve import ingress
from serve.answers import ChatStyle
from serve.errors import ErrorBody
from serve.guard import Caller
from serve.ingress import Gateway
from serve.metrics import REQUESTS, Meter
from serve.records import Ask, Delta, Item
from serve.request_log import RequestMeter
from serve.schemas import ChatRequest

ASK = Ask("chatcmpl-1", "a", ({"role": "user", "content": "hi"},), "", {}, None, None, ())


class Stream:
    """A handle's answer, whose replica fails after the first piece."""

    def __init__(self, error: Exception) -> None:
        self._error, self.cancelled = error, False

    async def __aiter__(self) -> AsyncIterator[Item]:
        yield Delta("he", None, 3, 1, "v1")
        raise self._error

    def cancel(self) -> None:
        self.cancelled = True


def gateway(stream: Stream) -> Any:
    """One whose only group answers with this stream."""
    made: Any = object.__new__(Gateway.func_or_class)
    generate = SimpleNamespace(remote=lambda ask: stream)
    made._hosts = {"group": SimpleNamespace(options=lambda **_: SimpleNamespace(generate=generate))}
    made._group_of = {"a": "group"}
    return made


def statuses(meter: RequestMeter) -> dict[str, float]:
    """How many requests ended with each status."""
    return {
        sample.labels["status"]: sample.value
        for family in meter.meter.collect()
        for sample in family.samples
        if sample.name == "farm_requests_total"
    }


@pytest.mark.parametrize("error", [ValueError("a bug in the replica"), RuntimeError("out of memory")])
def test_what_a_replica_raises_amid_an_answer_ends_it_with_an_error_and_is_counted_once(error):
    """Over gRPC it comes as it was raised, not as one of Ray's errors."""
    stream, meter = Stream(error), RequestMeter(Meter(REQUESTS))

    async def received() -> list[Item]:
        return [item async for item in meter.watch(ASK, gateway(stream)._items(ASK))]

    first, last = asyncio.run(received())
    assert isinstance(first, Delta)
    assert isinstance(last, ErrorBody)
    assert (last.status, last.type) == (500, "server_error")
    assert str(error) not in last.message
    assert statuses(meter) == {"500": 1}
    assert stream.cancelled


@pytest.mark.parametrize("num_sent", [0, 1])
def test_a_client_that_leaves_at_the_beginning_of_a_stream_frees_its_slot_at_once(monkeypatch, num_sent):
    """Not when whoever holds the response lets go of it; the first message is the response's status."""
    stream, meter = Stream(ValueError("is not reached")), RequestMeter(Meter(REQUESTS))
    # Serve keeps a copy of the class, with globals of its own.
    monkeypatch.setitem(Gateway.func_or_class._answer.__globals__, "request_meter", lambda: meter)
    request = ChatRequest.model_validate({"model": "a", "messages": ASK.messages, "stream": True})
    sent: list[Any] = []

    async def send(message: Any) -> None:
        if len(sent) == num_sent:
            raise asyncio.CancelledError
        sent.append(message)

    async def leave() -> None:
        response = await gateway(stream)._answer(request, ChatStyle(), Caller(None, None, None, None, None))
        with pytest.raises(asyncio.CancelledError):
            await response({"type": "http"}, None, send)
        assert stream.cancelled
        assert statuses(meter) == {"499": 1}

    asyncio.run(leave())


def test_a_proxy_is_told_not_to_hold_the_pieces_of_a_stream_back():
    async def nothing() -> AsyncIterator[Any]:
        return
        yield

    headers = ingress.EventStream(nothing(), nothing()).headers
    assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", "no-store")
