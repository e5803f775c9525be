"""Figures of a load: what is another model's answer, which requests a window holds, when a stream is whole."""

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable

import pytest
from aiohttp import web

from farm.bench.serve_client import Answer, Ask, Client
from farm.bench.serve_load import ClosedLoop, Window, is_of_another, open_loop, summary

SOLOS = {("a", 0): "the cat sat", ("b", 0): "the dog ran"}
WINDOW = Window(10.0, 20.0)


def ask(target: str = "a") -> Ask:
    return Ask(target, 0, ({"role": "user", "content": "?"},), 8)


def answer(text: str = "the cat sat", started_s: float = 11.0, ended_s: float = 12.0, **fields) -> Answer:
    made = Answer(ask(), started_s, status=200, text=text, num_tokens=5, ended_s=ended_s)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cat sat", False),
        ("the dog ran", True),
        ("the dog r", True),
        ("the cat ran", False),  # its own until a near tie
        ("the ", False),  # of neither more than of its own
    ],
)
def test_an_answer_is_of_another_target_when_it_goes_on_as_that_ones(text, expected):
    assert is_of_another(answer(text), SOLOS) is expected


def test_requests_count_by_their_start_and_tokens_by_when_they_came():
    answers = [
        # Began before: 3 of its 5 tokens count.
        answer(started_s=9.0, ended_s=11.0, event_s=[9.5, 9.9, 10.5, 10.6, 10.7]),
        answer(started_s=11.0, ended_s=21.0, event_s=[20.5]),  # comes after: it counts, its tokens do not
        answer("the dog ran", started_s=12.0, ended_s=13.0, event_s=[12.5]),
        answer(started_s=14.0, status=429, error="busy", retry_after="1"),
        answer(started_s=15.0, status=429, error="busy", retry_after=None),
        answer(started_s=16.0, status=500, error="broken"),
        answer(started_s=17.0, error="the stream ended before [DONE]"),
    ]
    found = summary(answers, WINDOW, SOLOS)
    counts = (
        "requests",
        "completed",
        "rejected_429",
        "rejected_without_retry_after",
        "errors",
        "wrong_model",
    )
    assert [found[name] for name in counts] == [6, 2, 2, 1, 2, 1]
    assert found["differing"] == 1
    assert (found["tokens_per_s"], found["pieces_per_s"]) == ((3 + 5) / 10, 4 / 10)


def test_latencies_are_of_the_first_piece_and_between_pieces():
    found = summary([answer(event_s=[11.5, 11.6, 11.9])], WINDOW, SOLOS)
    assert found["ttft_ms"]["p50"] == 500.0
    assert (found["itl_ms"]["p50"], found["itl_ms"]["p99"]) == (200.0, 299.0 - 1.0)


def chunk(text: str) -> bytes:
    event = {"choices": [{"delta": {"content": text}}], "system_fingerprint": "a@v1"}
    return b"data: " + json.dumps(event).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 3}}\n\n'
DONE = b"data: [DONE]\n\n"


def with_server(pieces: list[bytes], use: Callable[[Client], Awaitable[object]]) -> object:
    """What `use` returns with a client of a server that streams the pieces, or refuses when there are none."""

    async def stream(request: web.Request) -> web.StreamResponse:
        if not pieces:
            return web.Response(status=429, headers={"Retry-After": "1"}, text="busy")
        response = web.StreamResponse()
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0.002)
        return response

    async def run() -> object:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", stream)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        try:
            async with Client(f"http://127.0.0.1:{port}") as client:
                return await use(client)
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def test_an_answer_is_put_together_however_the_stream_is_cut():
    whole = chunk("the cat") + chunk(" sat") + USAGE + DONE
    for size in (7, 64, len(whole)):
        pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        got = with_server(pieces, lambda client: client.answer(ask()))
        assert (got.completed, got.text, got.num_tokens, got.versions) == (
            True,
            "the cat sat",
            3,
            {"a@v1", ""},
        )
        assert len(got.event_s) == 2


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([chunk("the cat")], "ended before"),
        ([chunk("the cat"), b'data: {"error": {"message": "lost"}}\n\n'], "lost"),
        ([], "busy"),
    ],
)
def test_a_stream_that_breaks_off_is_not_complete(pieces, error):
    got = with_server(pieces, lambda client: client.answer(ask()))
    assert not got.completed
    assert error in got.error


def test_a_closed_loop_never_has_more_open_than_clients_and_an_open_loop_has():
    async def most_open(client: Client, load: Callable[[Client], Awaitable[list[Answer]]]) -> tuple[int, int]:
        answers = await load(client)
        moments = sorted([(a.started_s, 1) for a in answers] + [(a.ended_s, -1) for a in answers])
        return len(answers), max(itertools.accumulate(change for _, change in moments))

    async def closed(client: Client) -> list[Answer]:
        loop = ClosedLoop(client, itertools.repeat(ask()), 3)
        await asyncio.sleep(0.2)
        return await loop.stop()

    async def arriving(client: Client) -> list[Answer]:
        return await open_loop(client, itertools.repeat(ask()), rate=300.0, seconds=0.3, seed=1)

    pieces = [chunk("the cat"), *[chunk(" sat")] * 10, DONE]
    num, most = with_server(pieces, lambda client: most_open(client, closed))
    assert (num > 3, most) == (True, 3)
    num, most = with_server(pieces, lambda client: most_open(client, arriving))
    assert 50 < num < 150
    assert most > 3
