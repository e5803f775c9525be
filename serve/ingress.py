"""The gateway: OpenAI's HTTP API in front of the engine host. It checks, forwards and formats."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from openai import BaseModel
from openai.types import Model
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from serve import pages
from serve.answers import ChatStyle, Head, Style, TextStyle, body, events, whole
from serve.metrics import exposition
from serve.records import Ask, Hosted, Item, ask_of
from serve.request_log import request_meter
from serve.schemas import (
    MAX_PROMPT_CHARS,
    ChatRequest,
    ErrorBody,
    TextRequest,
    mistake_in_body,
    too_large,
    unavailable,
    unknown_model,
)

QUIET = {"enable_access_log": False}  # Serve's own line a request; serve.metrics writes a better one
LIST_FRESH_S = 2.0  # how long the list of hosted targets is believed
LIST_WAIT_S = 5.0
RETRY_AFTER_S = 1
STARTED = int(time.time())
log = logging.getLogger("ray.serve")
api = FastAPI(title="farm", docs_url=None, redoc_url=None)
api.include_router(pages.router)


def refuse(error: ErrorBody) -> Response:
    """The HTTP response for an error; with 429 and 503 the client learns when to return."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
    return Response(json.dumps(error.envelope()), error.status, headers, media_type="application/json")


@api.exception_handler(RequestValidationError)
async def _on_bad_body(_: Request, error: RequestValidationError) -> Response:
    mistake = mistake_in_body(list(error.errors()))
    request_meter().refused(mistake.status)
    return refuse(mistake)


@api.exception_handler(HTTPException)
async def _on_bad_route(request: Request, error: HTTPException) -> Response:
    request_meter().refused(error.status_code)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    message = f"{request.method} {request.url.path}: {error.detail}"
    return refuse(ErrorBody(status=error.status_code, message=message, type=kind))


@api.exception_handler(Exception)
async def _on_bug(_: Request, error: Exception) -> Response:
    log.error("the gateway failed", exc_info=error)
    request_meter().refused(500)
    return refuse(ErrorBody(status=500, message="the gateway failed; its log says why", type="server_error"))


class EventStream(Response):
    """Server-sent events. Serve cancels the request of a client that leaves, which ends `events` here.

    Starlette's StreamingResponse would listen for that too, and report what Serve then raises as a bug.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with aclosing(self._events):
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# `serve.ingress` copies the app when it decorates: what its routes use must be defined above the class.
def _card(hosted: Hosted) -> Model:
    """OpenAI's model object; `version` is ours: the adapter that serves, "base" or "plain"."""
    fields = {"id": hosted.target, "created": STARTED, "object": "model", "owned_by": "farm"}
    return Model.model_validate({**fields, "version": hosted.version})


def _json(answer: BaseModel | dict[str, Any]) -> Response:
    content = body(answer) if isinstance(answer, BaseModel) else json.dumps(answer).encode()
    return Response(content, media_type="application/json")


@serve.deployment(name="Gateway", health_check_period_s=5, logging_config=QUIET)
@serve.ingress(api)
class Gateway:
    """Every answer is asked of the engine host; its first piece comes before the status of the response."""

    def __init__(self, engines: DeploymentHandle[Any]) -> None:
        self._engines = engines
        self._listed: list[Hosted] = []
        self._listed_at = -LIST_FRESH_S

    @api.get("/v1/models")
    async def models(self) -> Response:
        cards = [_card(hosted) for hosted in await self._hosted()]
        return _json({"object": "list", "data": [card.model_dump() for card in cards]})

    @api.get("/v1/models/{name}")
    async def model(self, name: str) -> Response:
        cards = [_card(hosted) for hosted in await self._hosted() if hosted.target == name]
        return _json(cards[0]) if cards else refuse(unknown_model(name))

    @api.post("/v1/chat/completions")
    async def chat(self, request: ChatRequest) -> Response:
        return await self._answer(request, ChatStyle())

    @api.post("/v1/completions")
    async def text(self, request: TextRequest) -> Response:
        return await self._answer(request, TextStyle())

    @api.get("/healthz")
    async def healthz(self) -> Response:
        return _json({"status": "ok", "targets": len(await self._hosted())})

    @api.get("/metrics")
    async def metrics(self) -> Response:
        """Prometheus text of the gateway and of every replica that answers in time."""
        asked = self._engines.broadcast("metrics").results_async(
            timeout_s=LIST_WAIT_S, return_exceptions=True
        )
        try:
            replicas = [found for found in await asked if not isinstance(found, BaseException)]
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("metrics: no replica answers: %s", error)
            replicas = []
        text = exposition([request_meter().meter.collect(), *replicas])
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def _answer(self, request: ChatRequest | TextRequest, style: Style) -> Response:
        if request.num_chars > MAX_PROMPT_CHARS:
            request_meter().refused(413)
            return refuse(too_large(request.num_chars))
        ask = ask_of(request)
        items, head = (
            request_meter().watch(ask, self._items(ask)),
            Head.of(ask.id, ask.target, tells_rounds=ask.include_rounds),
        )
        first = await anext(items)
        if isinstance(first, ErrorBody):
            return refuse(first)
        if request.stream:
            usage = request.stream_options.include_usage
            return EventStream(events(style, head, first, items, include_usage=usage))
        complete = await whole(style, head, first, items)
        return refuse(complete) if isinstance(complete, ErrorBody) else _json(complete)

    async def _items(self, ask: Ask) -> AsyncGenerator[Item, None]:
        """The answer's pieces; whatever goes wrong between here and the engine is the last item."""
        # By value: pieces come over gRPC, not each as an object of Ray's store, which costs both sides much more.
        stream = self._engines.options(stream=True, _by_reference=False).generate.remote(ask)
        try:
            async for item in stream:
                yield item
        except BackPressureError:
            yield ErrorBody(status=429, message="too many requests are waiting", type="rate_limit_error")
        except (RayActorError, RayServeException) as error:
            log.warning("%s: the replica was lost: %s", ask.id, error)
            yield unavailable("the replica was lost; send the request again")
        except RayError:
            log.exception("%s failed", ask.id)
            yield ErrorBody(status=500, message=f"{ask.id} failed in the server", type="server_error")
        finally:
            stream.cancel()  # frees the slot when the client has gone; nothing happens after the end

    async def _hosted(self) -> list[Hosted]:
        """The engines that take new requests; an older list when the replica is too busy to say."""
        if time.monotonic() - self._listed_at >= LIST_FRESH_S:
            try:
                hosted = await asyncio.wait_for(self._engines.hosted.remote(), LIST_WAIT_S)
            except (TimeoutError, RayError, RayServeException) as error:
                if not self._listed:
                    raise HTTPException(503, "no engine host answers") from error
            else:
                self._listed = [engine for engine in hosted if engine.is_current]
                self._listed_at = time.monotonic()
        return self._listed
