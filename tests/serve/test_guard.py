"""What is refused before a request is parsed, in a plain ASGI app in this process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from farm.errors import UserError
from farm.keys import add_key
from farm.sections import ServeSettings
from serve.errors import ErrorBody
from serve.guard import Caller, Guard, Guarded, caller_of


async def who(request: Request) -> Response:
    body = await request.body()
    if b"wait" in body:
        await asyncio.sleep(0.3)
    return JSONResponse({"name": caller_of(request).name, "bytes": len(body)})


async def health(_: Request) -> Response:
    return JSONResponse("ok")


def client(guard: Guard) -> httpx.AsyncClient:
    routes = [Route("/v1/who", who, methods=["GET", "POST"]), Route("/healthz", health)]
    app = Guarded(Starlette(routes=routes), lambda: guard)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def ask(guard: Guard, method: str = "POST", path: str = "/v1/who", **options: Any) -> httpx.Response:
    async def once() -> httpx.Response:
        async with client(guard) as one:
            return await one.request(method, path, **options)

    return asyncio.run(once())


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    path = tmp_path / "keys"
    return {
        "path": str(path),
        "all": add_key(path, "all"),
        "one": add_key(path, "one", ("legal",), max_concurrent=1, max_new_tokens=10, max_prompt_tokens=50),
    }


def test_without_a_file_of_keys_everybody_may_ask() -> None:
    assert ask(Guard(ServeSettings()), headers=bearer("whatever")).json()["name"] is None


def test_no_key_and_a_wrong_key_are_a_401_and_health_is_open(keys: dict[str, str]) -> None:
    guard = Guard(ServeSettings(keys=keys["path"]))
    for headers in ({}, bearer("wrong"), {"Authorization": keys["all"]}, {"Authorization": "Basic eDp5"}):
        for method in ("GET", "POST"):
            response = ask(guard, method, headers=headers)
            assert response.status_code == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "wrong" not in response.text
    assert ask(guard, headers=bearer(keys["all"])).json()["name"] == "all"
    assert ask(guard, headers={"Authorization": f"bearer  {keys['one']}"}).json()["name"] == "one"
    assert ask(guard, "GET", "/healthz").status_code == 200


def test_a_key_sees_its_own_targets_and_the_stricter_of_two_limits(keys: dict[str, str]) -> None:
    settings = ServeSettings(keys=keys["path"], max_new_tokens=20, max_prompt_tokens=30)
    ring = Guard(settings)._ring
    assert ring is not None
    all_, one = (Caller.of(ring.find(keys[name]), settings) for name in ("all", "one"))
    assert (all_.may_use("legal"), all_.may_use("other")) == (True, True)
    assert (one.may_use("legal"), one.may_use("other")) == (True, False)
    assert (all_.max_new_tokens, all_.max_prompt_tokens) == (20, 30)
    assert (one.max_new_tokens, one.max_prompt_tokens) == (10, 30)


def test_a_limit_of_tokens_is_a_refusal_when_asked_for_and_a_default_when_not() -> None:
    caller = Caller(None, None, None, 10, None)
    refused = caller.new_tokens(11, 11)
    assert isinstance(refused, ErrorBody)
    assert (refused.status, refused.param) == (400, "max_tokens")
    newer = caller.new_tokens(11, 11, "max_completion_tokens")
    assert isinstance(newer, ErrorBody)
    assert (newer.param, newer.message[:21]) == ("max_completion_tokens", "max_completion_tokens")
    assert caller.new_tokens(10, 10) == 10
    assert caller.new_tokens(None, None) == 10
    assert caller.new_tokens(None, 16) == 10
    assert Caller(None, None, None, None, None).new_tokens(None, None) is None
    assert Caller(None, None, None, None, None).new_tokens(None, 16) == 16


def test_more_choices_than_a_key_may_have_open_are_refused_by_name() -> None:
    caller = Caller("one", None, None, None, 2)
    refused = caller.too_many_choices(3)
    assert isinstance(refused, ErrorBody)
    assert (refused.status, refused.param) == (400, "n")
    assert caller.too_many_choices(2) is None
    assert Caller("all", None, None, None, None).too_many_choices(8) is None


def test_every_refusal_is_told_to_whoever_counts(keys: dict[str, str]) -> None:
    statuses: list[int] = []
    guard = Guard(ServeSettings(keys=keys["path"], max_body_bytes=10), statuses.append)

    async def together() -> None:
        async with client(guard) as one:
            waits = (one.post("/v1/who", content=b"wait", headers=bearer(keys["one"])) for _ in range(2))
            await asyncio.gather(*waits)

    asyncio.run(together())
    ask(guard)
    ask(guard, content=b"x" * 11, headers=bearer(keys["all"]))
    ask(guard, headers={"X-Request-ID": "a b"})
    guard.is_draining = True
    ask(guard, headers=bearer(keys["all"]))
    assert statuses == [429, 401, 413, 400, 503]


def test_a_key_is_asked_for_below_a_route_prefix_too(keys: dict[str, str]) -> None:
    guard = Guard(ServeSettings(keys=keys["path"]))
    answers = Starlette(routes=[Route("/v1/who", who)])

    async def below(prefix: str) -> int:
        app = httpx.ASGITransport(Guarded(answers, lambda: guard), root_path=prefix)
        async with httpx.AsyncClient(transport=app, base_url="http://test") as one:
            return (await one.get(f"{prefix}/v1/who")).status_code

    assert asyncio.run(below("/farm")) == 401
    assert asyncio.run(below("")) == 401


def test_a_body_is_bounded_while_it_is_read_whatever_its_length_is_said_to_be() -> None:
    guard, taken = Guard(ServeSettings(max_body_bytes=1000)), 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while taken < 10**6:
            taken += 100
            yield b"x" * 100

    assert ask(guard, content=b"x" * 1000).json()["bytes"] == 1000
    assert ask(guard, content=b"x" * 1001).status_code == 413
    assert ask(guard, content=b"x", headers={"Content-Length": "9" * 5000}).status_code == 413
    response = ask(guard, content=endless())
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"
    assert taken < 2000


def test_a_key_has_at_most_its_requests_open_and_others_are_not_held_up(keys: dict[str, str]) -> None:
    guard = Guard(ServeSettings(keys=keys["path"]))

    async def together() -> list[httpx.Response]:
        async with client(guard) as one:
            waits = [one.post("/v1/who", content=b"wait", headers=bearer(keys["one"])) for _ in range(2)]
            other = one.post("/v1/who", content=b"wait", headers=bearer(keys["all"]))
            listed = one.get("/v1/who", headers=bearer(keys["one"]))
            return list(await asyncio.gather(*waits, other, listed))

    first, second, other, listed = asyncio.run(together())
    assert (first.status_code, second.status_code) == (200, 429)
    assert (other.status_code, listed.status_code) == (200, 200)
    assert int(second.headers["Retry-After"]) >= 1
    assert second.json()["error"]["code"] == "max_concurrent"
    assert guard.num_open == 0
    assert ask(guard, headers=bearer(keys["one"])).status_code == 200


def test_nothing_new_begins_while_draining_but_what_is_open_goes_on() -> None:
    guard = Guard(ServeSettings())

    async def drained() -> tuple[httpx.Response, httpx.Response, int]:
        async with client(guard) as one:
            opened = asyncio.create_task(one.post("/v1/who", content=b"wait"))
            await asyncio.sleep(0.1)
            guard.is_draining = True
            open_then = guard.num_open
            late = await one.post("/v1/who")
            return await opened, late, open_then

    opened, late, open_then = asyncio.run(drained())
    assert (opened.status_code, late.status_code, open_then) == (200, 503, 1)
    assert int(late.headers["Retry-After"]) >= 1
    assert guard.num_open == 0


def test_pages_of_other_origins_are_let_in_only_where_they_are_named() -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    closed, opened = Guard(ServeSettings()), Guard(ServeSettings(cors=("https://page.example",)))
    assert "access-control-allow-origin" not in ask(closed, headers=asked).headers
    assert ask(closed, "OPTIONS", headers=asked).status_code == 405
    assert ask(opened, "OPTIONS", headers=asked).status_code == 200
    allowed = ask(opened, headers=asked).headers
    assert allowed["access-control-allow-origin"] == "https://page.example"
    other = ask(opened, headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers


def test_openais_client_is_let_in_from_a_browser_with_all_the_headers_that_it_sends() -> None:
    names = "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-retry-count"
    asked = {
        "Origin": "https://page.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": names,
    }
    opened = Guard(ServeSettings(cors=("https://page.example",)))
    allowed = ask(opened, "OPTIONS", headers=asked)
    assert allowed.status_code == 200
    assert set(names.split(",")) <= set(allowed.headers["access-control-allow-headers"].split(","))
    assert ask(opened, "OPTIONS", headers={**asked, "Origin": "https://other.example"}).status_code == 400


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, "<script>", "a\tb"])
def test_a_request_id_that_does_not_belong_into_a_log_is_refused_by_name(sent: str) -> None:
    response = ask(Guard(ServeSettings()), headers={"X-Request-ID": sent})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "x-request-id"
    assert ask(Guard(ServeSettings()), headers={"X-Request-ID": "trace-1:2.3/4"}).status_code == 200


def test_a_guard_without_its_file_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Guard(ServeSettings(keys=str(tmp_path / "none")))
