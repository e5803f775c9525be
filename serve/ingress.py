"""The gateway: OpenAI's HTTP API in front of the engine host. It checks, forwards and formats."""

import asyncio
import itertools
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from openai import BaseModel
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from pydantic import BaseModel as PydanticModel
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from farm.sections import ServeSettings
from serve import pages
from serve.answers import ChatStyle, Head, Style, TextStyle, body, events, whole
from serve.errors import (
    MAX_PROMPT_CHARS,
    ErrorBody,
    mistake_in_body,
    too_large,
    unavailable,
    unknown_model,
)
from serve.guard import Caller, Guard, Guarded, caller_of, refuse
from serve.listing import Listing
from serve.metrics import exposition
from serve.records import Ask, Hosted, Item, ask_of, named
from serve.request_log import request_meter
from serve.schemas import ChatRequest, TextRequest

QUIET = {"enable_access_log": False}  # Serve's own line a request; serve.metrics writes a better one
UNBUFFERED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would hold pieces back
METRICS_WAIT_S = 5.0
STARTED = int(time.time())
log = logging.getLogger("ray.serve")
api = FastAPI(
    title="farm",
    version="1",
    summary="OpenAI's completions for every target of a family",
    docs_url=None,
    redoc_url=None,
)
api.include_router(pages.router)


class Envelope(PydanticModel):
    """What every error looks like."""

    error: ErrorBody


# "4XX" keeps FastAPI from announcing its own 422, which nobody gets here.
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": Envelope} for status in (400, 401, 404, 413, 429, 503, "4XX")
}


def _answers(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The responses of an endpoint that answers whole or as a stream."""
    return {200: {"model": whole, "content": {"text/event-stream": {}}}, **REFUSALS}


def _guard_of_this_replica() -> Guard:
    gateway = serve.get_replica_context().servable_object
    assert isinstance(gateway.guard, Guard)
    return gateway.guard


api.add_middleware(Guarded, guard=_guard_of_this_replica)


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
    """Server-sent events, made of `items`. Serve cancels the request of a client that leaves, which ends both here.

    Starlette's StreamingResponse would listen for that too, and report what Serve then raises as a bug.
    """

    def __init__(self, events: AsyncGenerator[bytes, None], items: AsyncGenerator[Item, None]) -> None:
        super().__init__(media_type="text/event-stream", headers=UNBUFFERED)
        del self.headers["content-length"]
        self._events, self._items = events, items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI
        # Closing events that were never asked for closes nothing behind them: hence the items by themselves.
        async with aclosing(self._items), aclosing(self._events):
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class ModelList(PydanticModel):
    object: Literal["list"]
    data: list[Model]


# `serve.ingress` copies the app when it decorates: what its routes use must be defined above the class.
def _card(hosted: Hosted) -> Model:
    """OpenAI's model object. Ours are `version`, the adapter that serves, "base" or "plain", and its `canary`."""
    fields = {"id": hosted.target, "created": STARTED, "object": "model", "owned_by": "farm"}
    canary = None if hosted.canary is None else {"version": hosted.canary, "share": 1 - hosted.share}
    return Model.model_validate({**fields, "version": hosted.version, "canary": canary})


def _counted(error: ErrorBody) -> Response:
    """The refusal of a request that goes to no engine, which nothing else counts."""
    request_meter().refused(error.status)
    return refuse(error)


def _json(answer: BaseModel | dict[str, Any]) -> Response:
    content = body(answer) if isinstance(answer, BaseModel) else json.dumps(answer).encode()
    return Response(content, media_type="application/json")


@serve.deployment(name="Gateway", health_check_period_s=5, logging_config=QUIET)
@serve.ingress(api)
class Gateway:
    """Every answer is asked of an engine host; its first piece comes before the status of the response.

    `hosts` are the deployments of engine hosts by name, `group_of` names the one that holds a target.
    """

    def __init__(
        self, hosts: dict[str, DeploymentHandle[Any]], group_of: dict[str, str], settings: ServeSettings
    ) -> None:
        self._hosts, self._group_of = hosts, group_of
        self.guard = Guard(settings, request_meter().refused)
        self._listing = Listing(hosts)

    @api.get("/v1/models", responses={200: {"model": ModelList}, **REFUSALS})
    async def models(self, http: Request) -> Response:
        caller = caller_of(http)
        cards = [_card(hosted) for hosted in await self._hosted() if caller.may_use(hosted.target)]
        return _json({"object": "list", "data": [card.model_dump() for card in cards]})

    @api.get("/v1/models/{name}", responses={200: {"model": Model}, **REFUSALS})
    async def model(self, name: str, http: Request) -> Response:
        target, version = named(name)
        for hosted in await self._hosted() if caller_of(http).may_use(target) else []:
            if hosted.target == target and version in (None, hosted.version, hosted.canary):
                return _json(_card(hosted))
        return refuse(unknown_model(name))

    @api.post("/v1/chat/completions", responses=_answers(ChatCompletion))
    async def chat(self, request: ChatRequest, http: Request) -> Response:
        return await self._answer(request, ChatStyle(), caller_of(http))

    @api.post("/v1/completions", responses=_answers(Completion))
    async def text(self, request: TextRequest, http: Request) -> Response:
        return await self._answer(request, TextStyle(), caller_of(http))

    @api.get("/healthz")
    async def healthz(self) -> Response:
        """The gateway is alive; whether it can answer is for /readyz to say."""
        return _json({"status": "ok"})

    @api.get("/readyz", responses={503: {"model": Envelope}})
    async def readyz(self) -> Response:
        if self.guard.is_draining:
            return refuse(unavailable("the endpoint is shutting down"))
        return _json({"status": "ready", "targets": len(await self._hosted())})

    async def drain(self) -> int:
        """Take no new requests from now on; how many answers are still being given."""
        self.guard.is_draining = True
        return self.guard.num_open

    @api.get("/metrics", response_class=PlainTextResponse)
    async def metrics(self) -> Response:
        """Prometheus text of the gateway and of every replica that answers in time."""
        found = await asyncio.gather(*(self._counted_by(name) for name in self._hosts))
        text = exposition([request_meter().meter.collect(), *itertools.chain.from_iterable(found)])
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def _answer(self, request: ChatRequest | TextRequest, style: Style, caller: Caller) -> Response:
        if request.num_chars > MAX_PROMPT_CHARS:
            return _counted(too_large(request.num_chars))
        most = caller.new_tokens(request.asked_tokens, request.max_new_tokens, request.limit_field)
        if isinstance(most, ErrorBody):
            return _counted(most)
        too_many = caller.too_many_choices(request.n)
        if too_many is not None:
            return _counted(too_many)
        ask = ask_of(request, most, caller.max_prompt_tokens)
        if not caller.may_use(ask.target):
            return _counted(unknown_model(request.model))
        items = request_meter().watch(ask, self._items(ask))
        head = Head.of(ask.id, request.model, ask.target, tells_rounds=ask.include_rounds)
        first = await anext(items)
        if request.stream and not isinstance(first, ErrorBody):
            usage = request.stream_options.include_usage
            return EventStream(events(style, head, first, items, include_usage=usage), items)
        async with aclosing(items):
            answer = first if isinstance(first, ErrorBody) else await whole(style, head, first, items)
        return refuse(answer) if isinstance(answer, ErrorBody) else _json(answer)

    async def _items(self, ask: Ask) -> AsyncGenerator[Item, None]:
        """The answer's pieces; whatever goes wrong between here and the engine, or in it, is the last item."""
        group = self._group_of.get(ask.target)
        if group is None:
            yield unknown_model(ask.model)
            return
        # By value: pieces come over gRPC, not each as an object of Ray's store, which costs both sides much more.
        stream = self._hosts[group].options(stream=True, _by_reference=False).generate.remote(ask)
        try:
            async for item in stream:
                yield item
        except BackPressureError:
            yield ErrorBody(status=429, message="too many requests are waiting", type="rate_limit_error")
        except (RayActorError, RayServeException) as error:
            log.warning("%s: the replica was lost: %s", ask.id, error)
            yield unavailable("the replica was lost; send the request again")
        except Exception:  # a stream over gRPC raises what the replica raised, unwrapped
            log.exception("%s failed", ask.id)
            yield ErrorBody(status=500, message=f"{ask.id} failed in the server", type="server_error")
        finally:
            with suppress(BackPressureError):  # again, of one that was turned away
                stream.cancel()  # frees the slot when the client has gone; nothing happens after the end

    async def _counted_by(self, group: str) -> list[list[Metric]]:
        """What each replica of a group has counted; those that do not answer are left out."""
        asked = self._hosts[group].broadcast("metrics")
        try:
            found = await asked.results_async(timeout_s=METRICS_WAIT_S, return_exceptions=True)
        except (TimeoutError, RayError, RayServeException) as error:
            log.warning("metrics: no replica of %s answers: %s", group, error)
            return []
        return [replica for replica in found if not isinstance(replica, BaseException)]

    async def _hosted(self) -> list[Hosted]:
        """The engines that take new requests. HTTPException while none is known."""
        hosted = await self._listing.current()
        if not hosted:
            raise HTTPException(503, "no engine host answers")
        return hosted
