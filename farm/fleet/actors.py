"""The body of a regeneration actor: several targets in one process, one shard of one of them at a time."""

import gc
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import SecretStr

from farm.artifacts import Artifacts
from farm.config import Refused, UserError
from farm.data.shards import shard_names
from farm.fleet.answers import ANSWERS, AnswersJob, decode_prompts, put_card
from farm.fleet.base_draft import BaseDraft
from farm.sections import FAULTS, Dtype, TargetSpec
from farm.store import open_store

if TYPE_CHECKING:
    from farm.decode.regenerate import Speculation
    from farm.draft.model import Draft
    from farm.target.load import LoadedTarget


Load = Callable[[TargetSpec], "LoadedTarget"]
Beside = Callable[[TargetSpec, "LoadedTarget"], "LoadedTarget | None"]  # a LoRA target, over its checkpoint


@dataclass(frozen=True)
class ActorConfig:
    """What every actor of the pool is built from; it crosses Ray whole, models cross as paths."""

    store: str  # URI
    jobs: Mapping[str, AnswersJob]  # by target name, without their prompts
    memory_bytes: int  # budget of live targets in one actor
    num_threads: int  # of torch, one actor
    dtype: Dtype
    key: SecretStr | None = None  # of an endpoint that serves the targets
    draft: BaseDraft | None = None  # None: answers are decoded plainly


class LiveTargets:
    """Least-recently-used targets under a budget in bytes; room is made before the next one loads.

    LoRA targets lie beside one copy of their checkpoint, where `beside` can put them; it gives None for one that has
    to be merged, which then is a checkpoint of its own.
    """

    def __init__(self, memory_bytes: int, load: Load, beside: Beside | None = None) -> None:
        self._budget, self._load, self._beside = memory_bytes, load, beside
        self._live: OrderedDict[str, LoadedTarget] = OrderedDict()
        self._known_bytes: dict[str, int] = {}
        self._merged: set[str] = set()  # LoRA targets that cannot lie beside their checkpoint
        self.num_loads = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the live targets, the least recently used first; a shared checkpoint's is its path."""
        return tuple(self._live)

    def get(self, spec: TargetSpec) -> "LoadedTarget":
        """The loaded target; whatever `load` raises passes through and leaves the others loaded."""
        if spec.lora is None or self._beside is None or spec.name in self._merged:
            return self._whole(spec.name, spec)
        checkpoint = self._whole(spec.model, spec.model_copy(update={"lora": None}))
        if spec.name not in self._live:
            target = self._beside(spec, checkpoint)
            if target is None:
                self._merged.add(spec.name)  # its checkpoint is not asked for again
                return self._whole(spec.name, spec)
            self.num_loads += 1
            self._make_room(target.num_bytes, spec.model)
            self._live[spec.name] = target
        self._live.move_to_end(spec.name)
        self._live.move_to_end(spec.model)  # goes after all that lie beside it
        return self._live[spec.name]

    def _whole(self, name: str, spec: TargetSpec) -> "LoadedTarget":
        if name not in self._live:
            self._make_room(self._known_bytes.get(name, self._guess_bytes()))
            self.num_loads += 1
            target = self._load(spec)
            self._known_bytes[name] = target.num_bytes
            self._make_room(target.num_bytes)
            self._live[name] = target
        self._live.move_to_end(name)
        return self._live[name]

    def _guess_bytes(self) -> int:
        """A family's members are alike, so an unseen target is taken to be as large as the largest seen."""
        return max(self._known_bytes.values(), default=0)

    def _make_room(self, num_bytes: int, kept: str = "") -> None:
        freed = False
        while sum(t.num_bytes for t in self._live.values()) + num_bytes > self._budget:
            oldest = next((name for name in self._live if name != kept), None)
            if oldest is None:
                break
            del self._live[oldest]
            freed = True
        if freed:
            gc.collect()
            _release_device_memory()


class RegenerateActor:
    """Ray Data UDF: one row in is one shard of one target, one row out is what came of it.

    A target that cannot be loaded gives rows with a `failure`, for that target only. A shard's files are
    written whole and its card last, so that running a shard twice, or being killed in the middle, does no
    harm. Of two runs that write the same shard, the one whose card is there first has written it.
    """

    def __init__(self, config: ActorConfig) -> None:
        import torch

        from farm.target.load import open_target
        from farm.target.lora import open_beside

        torch.set_num_threads(config.num_threads)
        self._config = config
        self._artifacts = Artifacts(open_store(config.store))
        self._failures: dict[str, tuple[str, bool]] = {}  # by target: why, and whether it is refused
        self._draft: Draft | None = None  # of the base, for all targets
        self._speculations: dict[str, Speculation] = {}  # by target: what was learned outlives its weights
        self._targets = LiveTargets(
            config.memory_bytes, partial(open_target, dtype=config.dtype), open_beside
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        rows = [
            self._shard(str(target), int(shard), str(prompts), int(may_keep))
            for target, shard, prompts, may_keep in zip(
                *(batch[name] for name in ("target", "shard", "prompts", "may_keep")), strict=True
            )
        ]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _shard(self, name: str, shard: int, prompts: str, may_keep: int) -> dict[str, Any]:
        loads, rows, kept = self._targets.num_loads, 0, 0
        failure, refused = self._failures.get(name, ("", False))
        if not failure:
            try:
                rows, kept = self._write(self._config.jobs[name], shard, prompts, may_keep)
            except Refused as error:
                failure, refused = str(error), True
                self._failures[name] = failure, refused  # it would for the next shard too
            except Exception as error:  # noqa: BLE001 - any failure is this target's row in the report
                failure = f"{type(error).__name__}: {error}"
                if name not in self._targets.names or isinstance(error, UserError):
                    self._failures[name] = failure, refused
        return {
            "target": name,
            "shard": shard,
            "rows": rows,
            "feature_bytes": kept,
            "loads": self._targets.num_loads - loads,
            "failure": failure,
            "refused": refused,
        }

    def _write(self, job: AnswersJob, shard: int, prompts: str, may_keep: int) -> tuple[int, int]:
        """The rows of the shard and the bytes of the features that it keeps."""
        from farm.data.features import Answer, write_shard
        from farm.data.rejects import digest_of
        from farm.decode.endpoint import Endpoint
        from farm.decode.regenerate import prefill_rows, regenerate_rows

        started = time.monotonic()
        target, rows = self._targets.get(job.spec), decode_prompts(prompts)
        if job.mode == "dataset":
            answers = prefill_rows(target, rows, job.settings)
        else:
            elsewhere = job.settings.engine == "openai"
            endpoint = Endpoint.of(job.spec, job.settings, self._config.key) if elsewhere else None
            answers = regenerate_rows(target, rows, job.settings, endpoint, self._speculation(target))
        answers = [answer.judged(job.settings.reject) for answer in answers]
        writer = secrets.token_hex(4)  # another run may answer the same prompts meanwhile
        kept = write_shard(self._artifacts, ANSWERS, job.key, shard, answers, may_keep, writer)

        def usable(one: Answer) -> bool:
            return one.finish_reason != "error" and not one.rejected

        reasons, faults = [one.finish_reason for one in answers], [one.fault for one in answers]
        card = {
            "rows": len(answers),
            "finish_reasons": {reason: reasons.count(reason) for reason in ("stop", "length", "error")},
            "faults": {name: faults.count(name) for name in FAULTS if name in faults},
            "rejected": sum(answer.rejected for answer in answers),
            "digests": [digest_of(one.prompt_ids, one.answer_ids) for one in answers if usable(one)],
            "answer_tokens": sum(len(answer.answer_ids) for answer in answers),
            "feature_bytes": kept,
            "first_error": next((answer.error for answer in answers if answer.error), None),
            "seconds": time.monotonic() - started,
            "files": shard_names(shard, writer),
        }
        if not put_card(self._artifacts, job.key, shard, card):
            kept = 0
        return len(answers), kept

    def _speculation(self, target: "LoadedTarget") -> "Speculation | None":
        from farm.decode.regenerate import Speculation

        if self._config.draft is None:
            return None
        if self._draft is None:
            self._draft = self._config.draft.open(target.forward)
        if target.name not in self._speculations:
            self._speculations[target.name] = Speculation(self._draft)
        return self._speculations[target.name]


def _release_device_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
