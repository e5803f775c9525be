"""Regenerate and capture: one Ray Data pipeline over the missing shards of all targets."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.util.annotations import RayDeprecationWarning

from farm.artifacts import Artifacts
from farm.config import Refused
from farm.fleet.actors import ActorConfig, RegenerateActor
from farm.fleet.answers import AnswersJob, encode_prompts, endpoint_key, missing_shards
from farm.fleet.base_draft import BaseDraft
from farm.fleet.capacity import largest_cluster
from farm.fleet.pool import describe
from farm.resources import RegenerateResources
from farm.store import open_store

# Pipelines over all targets. An actor that dies ends its pipeline, and another runs what is missing: Ray Data may wait
# for ever for an actor whose node is gone, and would try a target whose load kills its process for ever.
MAX_PIPELINES = 3


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardResult:
    """What an actor says of one shard."""

    target: str
    shard: int
    rows: int
    feature_bytes: int  # that it keeps
    loads: int  # models the actor loaded for this shard, 0 or 1
    failure: str  # empty: the shard is in the store
    refused: bool  # the user can mend it

    @property
    def error(self) -> Exception:
        """What is wrong with the target, as its actor raised it."""
        return Refused(self.failure) if self.refused else RuntimeError(self.failure)


def regenerate(
    jobs: Sequence[AnswersJob],
    store: str,
    resources: RegenerateResources,
    on_shard: Callable[[ShardResult], None] | None = None,
    draft: BaseDraft | None = None,
) -> dict[str, Exception]:
    """Write every missing shard of `jobs` into `store` (a URI); returns {target name: why it failed}.

    With a `draft` greedy answers are drafted by it.

    A target fails alone. A pipeline breaks when an actor dies; what is missing is run again, the last times target by
    target, so that the one that kills its actor is found.
    """
    if not jobs:
        return {}
    artifacts = Artifacts(open_store(store))
    failures: dict[str, Exception] = {}
    for _ in range(MAX_PIPELINES):
        missing = _with_missing(artifacts, [job for job in jobs if job.name not in failures])
        try:
            _run(missing, artifacts, resources, failures, on_shard, draft)
            return failures
        except Exception as error:  # noqa: BLE001 - whatever broke, single runs say whose it was
            log.warning("a pipeline of answers ended early and runs again: %s", describe(error))
    for job in _with_missing(artifacts, [job for job in jobs if job.name not in failures]):
        try:
            _run([job], artifacts, resources, failures, on_shard, draft)
        except Exception as error:  # noqa: BLE001 - this target's row in the report
            failures[job.name] = error
    return failures


def _with_missing(artifacts: Artifacts, jobs: Sequence[AnswersJob]) -> list[AnswersJob]:
    return [job for job in jobs if missing_shards(artifacts, job)]


def _run(
    jobs: Sequence[AnswersJob],
    artifacts: Artifacts,
    resources: RegenerateResources,
    failures: dict[str, Exception],
    on_shard: Callable[[ShardResult], None] | None,
    draft: BaseDraft | None,
) -> None:
    rows = [row for job in jobs for row in _rows(artifacts, job)]
    if not rows:
        return
    pool = _pool(resources, len(rows))
    config = ActorConfig(
        store=artifacts.store.uri,
        jobs={job.name: job.without_prompts() for job in jobs},
        memory_bytes=jobs[0].settings.memory_bytes,
        dtype=jobs[0].dtype,
        key=endpoint_key(jobs[0].settings),
        draft=draft,
        num_threads=max(1, int(resources.num_cpus), (os.cpu_count() or 1) // int(pool.max_size)),
    )
    with _data_context():
        # One shard a block, in the order of the targets: blocks are clustered by target, and the pool can
        # scale.
        shards = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            RegenerateActor,
            fn_constructor_args=(config,),
            batch_size=1,
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            compute=pool,
            max_restarts=0,
            max_task_retries=0,
        )
        for row in shards.iter_rows():
            result = ShardResult(**row)
            if result.failure:
                failures.setdefault(result.target, result.error)
            if on_shard:
                on_shard(result)


def _rows(artifacts: Artifacts, job: AnswersJob) -> Iterator[dict[str, Any]]:
    for number in missing_shards(artifacts, job):
        prompts = encode_prompts(job.shard(number))
        yield {"target": job.name, "shard": number, "prompts": prompts, "may_keep": job.feature_bytes}


def _pool(resources: RegenerateResources, num_rows: int) -> ActorPoolStrategy:
    """Actors between min and max, never more than shards; without a free CPU Ray Data's own tasks starve."""
    room = resources.max_actors
    if resources.num_cpus:
        room = int((largest_cluster().resources.get("CPU", 1.0) - 1) / resources.num_cpus)
    largest = max(1, min(resources.max_actors, num_rows, room))
    return ActorPoolStrategy(
        min_size=min(resources.min_actors, largest), max_size=largest, max_tasks_in_flight_per_actor=2
    )


@contextmanager
def _data_context() -> Iterator[DataContext]:
    """Ray Data's process-wide context without its bars; as it was before when the block ends.

    The farm's own bars show the rows of each target, whichever stage they are in.
    """
    context = DataContext.get_current()
    before: Mapping[str, Any] = {
        name: getattr(context, name) for name in ("enable_progress_bars", "print_on_execution_start")
    }
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else it says that its bars are off
    context.print_on_execution_start = False
    try:
        with warnings.catch_warnings():
            # Bounding restarts has no other spelling in this Ray; it says so with each pipeline.
            warnings.simplefilter("ignore", RayDeprecationWarning)
            yield context
    finally:
        for name, value in before.items():
            setattr(context, name, value)
