"""The engine host: a replica that holds the trunk once and decodes for every target of the family."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from ray import serve

from farm.config import UserError
from farm.data.chat import encode_chat
from farm.decode.controls import make_control
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.decode.stats import DecodeStats
from farm.sections import Dtype, ServeSettings
from farm.target.load import LoadedTarget
from serve.choices import Choice, Mail, answer, choice_seed
from serve.detokenize import TextStream
from serve.family import LOAD_ERRORS, PLAIN, Family, ServedDraft
from serve.loop import EngineLoop, Lane, Progress
from serve.records import Ask, Delta, Hosted, Item
from serve.schemas import ErrorBody, context_exceeded, mistake_in_bias, too_many_tokens, unknown_model
from serve.spelling import Spelling

POLL_S = 2.0  # how often the live pointers are looked at
log = logging.getLogger("ray.serve")


@serve.deployment(name="EngineHost", health_check_period_s=5, graceful_shutdown_timeout_s=30)
class EngineHost:
    """Routes each request to its target's engine; engines step in one thread beside the event loop."""

    def __init__(self, store: str, settings: ServeSettings, dtype: Dtype | None, device: str) -> None:
        self._settings = settings
        self._family = Family(store, dtype, device)
        self._engines = EngineLoop(self._new_engine)
        self._targets: dict[str, LoadedTarget] = {}
        self._spellings: dict[str, Spelling] = {}
        self._seen: dict[str, str | None] = {}  # live version last acted upon, loaded or not
        for target in self._family.targets():
            self._targets[target.name] = target
            self._spellings[target.name] = Spelling(target.tokenizer)
            self._host_first(target)
        if not self._targets:
            raise UserError(f"{store}: none of its targets can be loaded; the log has each one's reason")
        self._engines.start()
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def generate(self, ask: Ask) -> AsyncIterator[Item]:
        """The pieces of the answer as they come, or one ErrorBody; leaving early frees the slot."""
        target = self._targets.get(ask.target)
        request = unknown_model(ask.model) if target is None else await self._checked(target, ask)
        if target is None or isinstance(request, ErrorBody):
            yield request
            return
        mailbox: asyncio.Queue[Mail] = asyncio.Queue()
        event_loop = asyncio.get_running_loop()

        def deliver(index: int, progress: Progress) -> None:
            event_loop.call_soon_threadsafe(mailbox.put_nowait, (index, progress))

        requests = [_choice(request, index) for index in range(ask.num_choices)]
        spell = None if request.params.logprobs is None else self._spellings[ask.target]
        choices = [
            Choice(index, TextStream(partial(_decode, target), ask.stop), spell)
            for index in range(ask.num_choices)
        ]
        for index, one in enumerate(requests):
            self._engines.submit(ask.target, one, partial(deliver, index), ask.version)
        try:
            async for item in answer(mailbox, choices, len(request.prompt_ids)):
                if isinstance(item, Delta) and item.finish_reason is not None:
                    # A stop string ends a choice before the engine would.
                    self._engines.cancel(requests[item.index].id)
                yield item
        finally:
            for one in requests:
                self._engines.cancel(one.id)

    async def hosted(self) -> list[Hosted]:
        """Every engine of this replica, seen between two steps."""
        return await asyncio.wrap_future(self._engines.inspect(_describe))

    async def check_health(self) -> None:
        if not self._engines.is_alive:
            raise RuntimeError(f"the engine thread ended: {self._engines.failure}")

    def __del__(self) -> None:
        if hasattr(self, "_engines"):
            self._engines.stop()

    async def _checked(self, target: LoadedTarget, ask: Ask) -> Request | ErrorBody:
        """The request for the engine, or what is wrong with it."""
        mistake = mistake_in_bias(ask.sampling["logit_bias"], target.forward.vocab_size)
        if mistake is not None:
            return mistake
        try:
            request = await asyncio.to_thread(self._request, target, ask)
        except UserError as error:
            return ErrorBody(status=400, message=str(error), param="messages" if ask.messages else "prompt")
        num_tokens, most = len(request.prompt_ids), self._max_length(target)
        if not num_tokens:
            return ErrorBody(status=400, message="prompt: is empty", param="prompt")
        if num_tokens > (ask.max_prompt_tokens or num_tokens):
            return too_many_tokens(num_tokens, ask.max_prompt_tokens)
        return request if num_tokens < most else context_exceeded(num_tokens, most)

    def _max_length(self, target: LoadedTarget) -> int:
        return min(self._settings.max_length, target.max_positions)

    def _request(self, target: LoadedTarget, ask: Ask) -> Request:
        if ask.messages:
            ids = encode_chat(target.tokenizer, ask.messages, target.chat_template)
        elif isinstance(ask.prompt, str):
            ids = target.tokenizer(ask.prompt)["input_ids"]
        else:
            ids = list(ask.prompt)
            if any(not 0 <= token < target.forward.vocab_size for token in ids):
                raise UserError(f"prompt: token ids must be from 0 to {target.forward.vocab_size - 1}")
        params = SamplingParams(
            **ask.sampling,
            seed=secrets.randbits(63) if ask.seed is None else ask.seed,
            max_new_tokens=ask.max_new_tokens or self._settings.max_length,
        )
        return Request(ask.id, tuple(ids), params)

    def _host_first(self, target: LoadedTarget) -> None:
        """Serve the target with its live adapter or the base's draft; plainly if that cannot be loaded."""
        self._seen[target.name] = None
        try:
            live = self._family.live(target.name)
            self._seen[target.name] = live.version if live else None
            draft = self._family.draft(target, live if self._family.fits(live) else None)
        except LOAD_ERRORS as error:
            log.error("%s is decoded plainly: %s", target.name, error)
            draft = ServedDraft(PLAIN, None)
        self._host(target, draft)

    def _host(self, target: LoadedTarget, draft: ServedDraft) -> None:
        route = Route(target.forward, target.stop_ids, draft.draft, target.lora)
        self._engines.host(target.name, draft.version, route)
        log.info("%s@%s takes the requests from now on", target.name, draft.version)

    def _new_engine(self, route: Route) -> Engine:
        settings = self._settings
        return Engine(
            [route],
            num_slots=settings.num_slots,
            max_length=min(settings.max_length, route.forward.max_positions),
            k=settings.k,
            control=make_control(settings.control, settings.k),
        )

    async def _watch(self) -> None:
        """Follow the live pointers. What goes wrong with one target is logged and leaves it as it is."""
        while True:
            await asyncio.sleep(POLL_S)
            for target in self._targets.values():
                try:
                    await asyncio.to_thread(self._follow, target)
                except LOAD_ERRORS as error:
                    log.warning("%s: its live version cannot be read: %s", target.name, error)

    def _follow(self, target: LoadedTarget) -> None:
        live = self._family.live(target.name)
        version = live.version if live else None
        if version == self._seen[target.name]:
            return
        try:
            self._host(target, self._family.draft(target, live))
        except UserError as error:  # a version never changes: trying it again would not help
            log.error("%s keeps its draft: %s", target.name, error)
        self._seen[target.name] = version


def _choice(request: Request, index: int) -> Request:
    params = replace(request.params, seed=choice_seed(request.params.seed, index))
    return replace(request, id=f"{request.id}/{index}", params=params)


def _decode(target: LoadedTarget, tokens: Sequence[int]) -> str:
    text = target.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _describe(lanes: list[Lane], current: Mapping[str, Lane]) -> list[Hosted]:
    return [_hosted(lane, is_current=current[lane.target] is lane) for lane in lanes]


def _hosted(lane: Lane, *, is_current: bool) -> Hosted:
    stats = lane.engine.stats_of.get(lane.route, DecodeStats())
    return Hosted(
        target=lane.target,
        version=lane.version,
        is_current=is_current,
        num_open=len(lane.sinks),
        num_live=sum(row.request.target == lane.route for row in lane.engine.scheduler.live),
        rounds=stats.rounds,
        emitted=stats.emitted,
        pid=os.getpid(),
    )
