"""Who may ask, and how much: checks before a request is parsed, as ASGI middleware.

In this order: a sane request id, nothing new while draining, the bearer key, how many requests the key has open, the
size of the body. Paths outside of /v1/ are open.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farm.keys import Key, KeyRing
from farm.sections import ServeSettings
from serve.errors import ErrorBody, unavailable

RETRY_AFTER_S = 1
PROTECTED = "/v1/"
REQUEST_ID = "x-request-id"
SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
log = logging.getLogger("ray.serve")


def refuse(error: ErrorBody) -> Response:
    """The HTTP response for an error; with 429 and 503 the client learns when to return, with 401 how to come in."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(json.dumps(error.envelope()), error.status, headers, media_type="application/json")


@dataclass(frozen=True)
class Caller:
    """Who asks, as far as a key tells, and within which limits: the stricter of the key's and the endpoint's."""

    name: str | None
    targets: frozenset[str] | None  # None: all
    max_prompt_tokens: int | None
    max_new_tokens: int | None
    max_concurrent: int | None

    @classmethod
    def of(cls, key: Key | None, settings: ServeSettings) -> "Caller":
        most = settings.max_prompt_tokens, settings.max_new_tokens
        if key is None:
            return cls(None, None, *most, None)
        targets = None if key.targets == "*" else frozenset(key.targets)
        prompt, new = (
            _least(*pair) for pair in zip((key.max_prompt_tokens, key.max_new_tokens), most, strict=True)
        )
        return cls(key.name, targets, prompt, new, key.max_concurrent)

    def may_use(self, target: str) -> bool:
        return self.targets is None or target in self.targets

    def new_tokens(
        self, asked: int | None, default: int | None, field: str = "max_tokens"
    ) -> int | None | ErrorBody:
        """The limit of an answer: what the client asked for by `field` if that is allowed, else the smaller default."""
        if asked is not None and asked > (self.max_new_tokens or asked):
            message = f"{field}: {asked} is more than the {self.max_new_tokens} that are allowed here"
            return ErrorBody(status=400, message=message, param=field, code="invalid_value")
        return asked or _least(default, self.max_new_tokens)

    def too_many_choices(self, asked: int) -> ErrorBody | None:
        """What is wrong with an `n` above `max_concurrent`: a choice takes a slot as a request does. None: nothing."""
        if asked <= (self.max_concurrent or asked):
            return None
        message = f"n: {asked} is more than the {self.max_concurrent} that this key may have open"
        return ErrorBody(status=400, message=message, param="n", code="invalid_value")


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


class Guard:
    """The checks of one gateway replica, and its open requests."""

    def __init__(
        self, settings: ServeSettings, refused: Callable[[int], None] = lambda _status: None
    ) -> None:
        """`refused` is told the status of each refusal. UserError when there is a file of keys that cannot be read."""
        self._settings, self._refused = settings, refused
        self._ring = None if settings.keys is None else KeyRing(Path(settings.keys))
        self._open: Counter[str | None] = Counter()
        self.is_draining = False

    @property
    def num_open(self) -> int:
        """Answers that are being given."""
        return self._open.total()

    def around(self, app: ASGIApp) -> ASGIApp:
        """The app behind the checks, and where origins are allowed behind CORS: browsers ask for that without a key."""

        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            await self._check(app, scope, receive, send)

        if not self._settings.cors:
            return checked
        return CORSMiddleware(
            checked,
            allow_origins=self._settings.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client in a browser sends a dozen of its own
            expose_headers=[REQUEST_ID, "Retry-After"],
        )

    async def _check(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        headers, answers = Headers(scope=scope), scope["method"] == "POST"
        if not SANE_ID.fullmatch(headers.get(REQUEST_ID, "none")):
            message = f"{REQUEST_ID}: has to be 1 to 128 letters, digits or any of ._:/+=@-"
            await self._refuse(ErrorBody(status=400, message=message, param=REQUEST_ID))(scope, receive, send)
            return
        if not scope["path"].removeprefix(scope.get("root_path", "")).startswith(PROTECTED):
            await app(scope, receive, send)
            return
        caller = self._admit(headers.get("authorization"), answers=answers)
        if isinstance(caller, ErrorBody):
            await self._refuse(caller)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        self._open[caller.name] += answers
        try:
            again = await bounded(scope, receive, self._settings.max_body_bytes)
            if isinstance(again, ErrorBody):
                await self._refuse(again)(scope, receive, send)
            else:
                await app(scope, again, send)
        finally:
            self._open[caller.name] -= answers

    def _refuse(self, error: ErrorBody) -> Response:
        self._refused(error.status)
        return refuse(error)

    def _admit(self, authorization: str | None, *, answers: bool) -> Caller | ErrorBody:
        if answers and self.is_draining:
            return unavailable("the endpoint is shutting down; another replica or a later try will answer")
        key = None
        if self._ring is not None:
            scheme, _, presented = (authorization or "").partition(" ")
            key = self._ring.find(presented.strip()) if scheme.lower() == "bearer" else None
            if key is None:
                message = "no valid key; send `Authorization: Bearer KEY` with a key of this endpoint"
                return ErrorBody(
                    status=401, message=message, type="authentication_error", code="invalid_api_key"
                )
        caller = Caller.of(key, self._settings)
        if answers and self._open[caller.name] >= (caller.max_concurrent or self._open[caller.name] + 1):
            message = (
                f"key {caller.name!r} has its {caller.max_concurrent} requests open already (max_concurrent)"
            )
            return ErrorBody(status=429, message=message, type="rate_limit_error", code="max_concurrent")
        return caller


class Guarded:
    """Middleware around an app whose guard is known only once its replica is made."""

    def __init__(self, app: ASGIApp, guard: Callable[[], Guard]) -> None:
        self._app, self._guard = app, guard
        self._guarded: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._guarded is None:
            self._guarded = self._guard().around(self._app)
        await self._guarded(scope, receive, send)


def caller_of(request: Any) -> Caller:
    """The caller that the guard has found for a request."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


async def bounded(scope: Scope, receive: Receive, most: int) -> Receive | ErrorBody:
    """`receive` with the whole body read already; the error as soon as it is longer than `most` bytes."""
    error = ErrorBody(status=413, message=f"the body has more than {most} bytes", code="request_too_large")
    told = Headers(scope=scope).get("content-length", "")
    if told.isdecimal() and (len(told) > len(str(most)) or int(told) > most):
        return error
    messages, size = list[Message](), 0
    while not messages or messages[-1].get("more_body", False):
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
        if size > most:
            return error

    async def again() -> Message:
        return messages.pop(0) if messages else await receive()

    return again
