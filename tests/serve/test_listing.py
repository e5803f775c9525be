"""The list of what is hosted: asked seldom, by one at a time, and not waited for once there is one."""

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable
from types import SimpleNamespace

import pytest

import serve.listing
from serve.listing import Listing
from serve.records import Hosted

request_of = contextvars.ContextVar("request", default="none")


def hosted(target: str, version: str = "v1", *, is_current: bool = True) -> Hosted:
    return Hosted(target, version, is_current, 1.0, "", None, 0, 0, 0, 0, 1)


def listing(**groups: Callable[[], Awaitable[list[Hosted]]]) -> Listing:
    """Of groups that answer as these functions do."""
    return Listing(
        {name: SimpleNamespace(hosted=SimpleNamespace(remote=ask)) for name, ask in groups.items()}
    )


def names(found: list[Hosted]) -> list[str]:
    return [f"{one.target}@{one.version}" for one in found]


def test_the_current_engines_of_all_groups_are_listed_and_asked_for_once():
    asked = []

    async def first():
        asked.append(request_of.get())
        await asyncio.sleep(0.01)
        return [hosted("c"), hosted("a"), hosted("a", "v0", is_current=False)]

    async def second():
        return [hosted("b")]

    async def twice():
        request_of.set("a client's")
        one = listing(first=first, second=second)
        return [*await asyncio.gather(one.current(), one.current()), await one.current()]

    for found in asyncio.run(twice()):
        assert names(found) == ["a@v1", "b@v1", "c@v1"]
    assert asked == ["none"]  # whoever asks may leave, and Serve ends what was asked in a request's name


def test_a_full_group_is_waited_for_only_until_it_has_answered_once(monkeypatch):
    monkeypatch.setattr(serve.listing, "FRESH_S", 0.0)
    monkeypatch.setattr(serve.listing, "OLDER_AFTER_S", 0.05)
    free = asyncio.Event()
    versions = {"full": "v1", "other": "v1"}

    async def full():
        await free.wait()
        return [hosted("full", versions["full"])]

    async def other():
        return [hosted("other", versions["other"])]

    async def ask():
        one = listing(full=full, other=other)
        asyncio.get_running_loop().call_later(0.2, free.set)
        assert names(await one.current()) == ["full@v1", "other@v1"]
        free.clear()
        versions.update(full="v2", other="v2")
        started_s = time.perf_counter()
        assert names(await one.current()) == ["full@v1", "other@v2"]
        assert names(await one.current()) == ["full@v1", "other@v2"]
        assert time.perf_counter() - started_s < 1.0
        free.set()
        await asyncio.sleep(0.01)
        assert names(await one.current()) == ["full@v2", "other@v2"]

    asyncio.run(ask())


@pytest.mark.parametrize("wrong", [TimeoutError("away"), RuntimeError("a bug")])
def test_a_group_that_fails_keeps_what_it_said_and_is_asked_again(monkeypatch, wrong):
    monkeypatch.setattr(serve.listing, "FRESH_S", 0.0)
    answers = iter([wrong, [hosted("a")], wrong, [hosted("a", "v2")]])

    async def ask():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def four_times():
        one = listing(only=ask)
        return [names(await one.current()) for _ in range(4)]

    assert asyncio.run(four_times()) == [[], ["a@v1"], ["a@v1"], ["a@v2"]]


def test_a_group_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(serve.listing, "ASK_S", 0.05)

    async def never():
        await asyncio.sleep(60)

    assert asyncio.run(listing(only=never).current()) == []
