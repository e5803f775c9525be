"""The engine host: a replica that holds the trunk once and decodes for every target of the family."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial

from prometheus_client.metrics_core import Metric
from ray import serve
from ray.util import metrics as ray_metrics

from farm.config import UserError
from farm.data.chat import encode_chat
from farm.decode.controls import drafting_options
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.decode.stats import DecodeStats
from farm.sections import Dtype, ServeSettings
from farm.target.load import LoadedTarget
from serve.canary import WorseTest
from serve.choices import Choice, Mail, answer, choice_seed
from serve.detokenize import TextStream
from serve.errors import ErrorBody, context_exceeded, mistake_in_bias, too_many_tokens, unknown_model
from serve.family import PLAIN, Family, ServedDraft
from serve.lanes import Lane, Progress
from serve.lengths import longest, shortened
from serve.loop import EngineLoop
from serve.metrics import EngineMeter
from serve.records import Ask, Delta, Hosted, Item
from serve.rollout import Rollout
from serve.spelling import Spelling

EXPORT_S = 2.0
PLAIN_AFTER = 8  # requests in a row that were decoded plainly
log = logging.getLogger("ray.serve")


@serve.deployment(
    name="EngineHost",
    health_check_period_s=5,
    logging_config={"enable_access_log": False},
)
class EngineHost:
    """Routes each request to its target's engine; engines step in one thread beside the event loop."""

    def __init__(
        self, store: str, settings: ServeSettings, dtype: Dtype | None, device: str, targets: Collection[str]
    ) -> None:
        self._settings = settings
        family = Family(store, dtype, device, targets)
        self._has_trunk = family.trunk is not None
        if self._has_trunk and (said := shortened(settings)):
            log.warning("%s", said)
        self._meter = EngineMeter(serve.get_replica_context().replica_id.unique_id, ray_metrics)
        self._engines = EngineLoop(self._new_engine, self._meter.read_last)
        self._rollout = Rollout(
            family, self._engines, self._new_test, self._took_over, self._meter.rolled_back
        )
        self._targets: dict[str, LoadedTarget] = {}
        self._spellings: dict[str, Spelling] = {}
        for target in family.targets():
            self._targets[target.name] = target
            self._spellings[target.name] = Spelling(target.tokenizer)
            self._rollout.add(target)
        if not self._targets:
            raise UserError(f"{store}: none of its targets can be loaded; the log has each one's reason")
        self._engines.start()
        self._rollout.start()
        self._exporter = asyncio.get_running_loop().create_task(self._export())

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
        told_ids = request.prompt_ids if ask.return_token_ids else None
        choices = [
            Choice(
                index,
                TextStream(partial(_decode, target), ask.stop),
                spell,
                tells_rounds=ask.include_rounds,
                prompt_ids=told_ids,
            )  # fmt: skip
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
        return await asyncio.wrap_future(self._engines.inspect(partial(_describe, self._rollout.reason)))

    async def metrics(self) -> list[Metric]:
        """What this replica has counted, up to the present step."""
        await asyncio.wrap_future(self._engines.inspect(self._read_meter))
        return self._meter.collect()

    def _took_over(self, target: str, draft: ServedDraft) -> None:
        """A version takes a target's requests from now on."""
        self._meter.hosted(target, draft.version)
        if draft.draft is None:
            self._meter.fell_back(target, "adapter" if self._has_trunk else "trunk")

    async def _export(self) -> None:
        """For Ray's exporter, which nobody asks through here."""
        while True:
            await asyncio.sleep(EXPORT_S)
            try:
                await self.metrics()
            except Exception:
                log.exception("nothing was exported in this round")

    def _read_meter(self, lanes: list[Lane], current: Mapping[str, Lane]) -> None:  # noqa: ARG002 - inspect gives both
        self._meter.read(lanes)

    async def check_health(self) -> None:
        if not self._engines.is_alive:
            raise RuntimeError(f"the engine thread ended: {self._engines.failure}")
        if not self._rollout.is_alive:
            raise RuntimeError("the registry is not followed any more")

    def __del__(self) -> None:
        if hasattr(self, "_rollout"):
            self._rollout.stop()
            self._engines.stop()

    async def _checked(self, target: LoadedTarget, ask: Ask) -> Request | ErrorBody:
        """The request for the engine, or what is wrong with it."""
        mistake = mistake_in_bias(ask.sampling["logit_bias"], target.forward.vocab_size)
        if mistake is not None:
            return mistake
        if self._settings.tree is not None and ask.sampling["max_drafted"]:
            message = "max_drafted: trees are drafted here, and it is a length of chains; leave it out, or set it to 0"
            return ErrorBody(status=400, message=message, param="max_drafted", code="invalid_value")
        param = "messages" if ask.messages else "prompt"
        try:
            request = await asyncio.to_thread(self._request, target, ask)
        except UserError as error:
            return ErrorBody(status=400, message=str(error), param=param)
        num_tokens, most = len(request.prompt_ids), self._max_length(target.max_positions)
        if not num_tokens:
            return ErrorBody(status=400, message="prompt: is empty", param="prompt")
        if num_tokens > (ask.max_prompt_tokens or num_tokens):
            return too_many_tokens(num_tokens, ask.max_prompt_tokens)
        return request if num_tokens < most else context_exceeded(num_tokens, most, param)

    def _max_length(self, positions: int) -> int:
        """Of a target's sequences: an engine whose target has no draft now may get one later."""
        return longest(self._settings, positions, drafts=self._has_trunk)

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

    def _new_engine(self, route: Route) -> Engine:
        settings = self._settings
        return Engine(
            [route],
            num_slots=settings.num_slots,
            max_length=self._max_length(route.forward.max_positions),
            **drafting_options(settings),
        )

    def _new_test(self, share: float) -> WorseTest:
        settings = self._settings
        # The most that one round can accept.
        most_drafted = settings.k if settings.tree is None else settings.tree.depth
        return WorseTest(share, most_drafted, settings.canary_margin, settings.canary_alpha)


def _choice(request: Request, index: int) -> Request:
    params = replace(request.params, seed=choice_seed(request.params.seed, index))
    return replace(request, id=f"{request.id}/{index}", params=params)


def _decode(target: LoadedTarget, tokens: Sequence[int]) -> str:
    text = target.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _describe(reason: Callable[[str], str], lanes: list[Lane], current: Mapping[str, Lane]) -> list[Hosted]:
    canaries = {lane.target: lane for lane in lanes if lane.test is not None}
    return [_hosted(lane, current[lane.target] is lane, canaries.get(lane.target), reason) for lane in lanes]


def _hosted(lane: Lane, is_current: bool, canary: Lane | None, reason: Callable[[str], str]) -> Hosted:
    """`canary` is that of the lane's target."""
    stats = lane.engine.stats_of.get(lane.route, DecodeStats())
    tried = 0.0 if canary is None else canary.share
    share = 1 - tried if is_current else tried if lane is canary else 0.0
    said = reason(lane.target) if is_current else ""
    if not said and lane.plain_in_a_row >= PLAIN_AFTER:
        said = f"{PLAIN}: drafting does not pay at this load"
    return Hosted(
        target=lane.target,
        version=lane.version,
        is_current=is_current,
        share=share,
        reason=said,
        e_value=lane.test.e_value if lane.test is not None else None,
        num_open=len(lane.sinks),
        num_live=sum(row.request.target == lane.route for row in lane.engine.scheduler.live),
        rounds=stats.rounds,
        emitted=stats.emitted,
        pid=os.getpid(),
        canary=canary.version if is_current and canary is not None else None,
    )
