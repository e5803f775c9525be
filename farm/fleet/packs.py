"""Many small targets in one Ray Train run: its processes and groups start once.

A target is published as soon as it is fitted. One that fails is left out; where it takes the whole run with it, the
rest go on in another one.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.artifacts import Artifact, Artifacts
from farm.fleet.pool import TargetFailed, run_bounded
from farm.fleet.session import runs_at_once
from farm.fleet.trainers import (
    PackJob,
    TrainJob,
    publish_fitted,
    report_checkpoint,
    steps_shown,
    train,
    trainer,
)
from farm.sections import AdaptSettings
from farm.store import open_store

if TYPE_CHECKING:
    from farm.train.loop import FitResult

# Of a private expert: its training takes about as long as a run's processes take to start.
SMALL_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Ended:
    """What became of one target: its artifact, or why it has none."""

    name: str
    artifact: Artifact | None
    error: BaseException | None


def jobs_of(run: PackJob | TrainJob) -> tuple[TrainJob, ...]:
    """The targets of a run."""
    return run.jobs if isinstance(run, PackJob) else (run,)


def divide(
    jobs: Sequence[TrainJob], at_once: int, most: int | None, expert_bytes: int
) -> list[PackJob | TrainJob]:
    """The runs of some jobs: at most `most` targets in one; None: as many as fill `at_once` runs, if they are small."""
    if most is None:
        most = -(-len(jobs) // at_once) if expert_bytes <= SMALL_BYTES else 1
    num_runs = -(-len(jobs) // most)
    groups = [tuple(jobs[number::num_runs]) for number in range(num_runs)]
    return [PackJob(group) if len(group) > 1 else group[0] for group in groups]


def in_runs(jobs: Sequence[TrainJob]) -> list[PackJob | TrainJob]:
    """The runs of some adapt jobs, as their resources ask for on the connected cluster; all have the same ones."""
    if not jobs:
        return []
    like = jobs[0]
    task, settings = like.task, like.task.settings
    assert isinstance(settings, AdaptSettings)
    expert_bytes = 12 * task.draft.hidden_size * (settings.width or task.draft.private_width)
    fit = min(runs_at_once(like.resources), len(jobs))
    runs = divide(jobs, fit, like.resources.pack, expert_bytes)
    width = min(fit, len(runs))  # fewer runs than fit share the cores among themselves
    beside = [tuple(replace(job, at_once=width) for job in jobs_of(run)) for run in runs]
    return [PackJob(group) if len(group) > 1 else group[0] for group in beside]


def fit_runs(
    runs: Sequence[PackJob | TrainJob], started: Callable[[PackJob | TrainJob], None]
) -> Iterator[Ended]:
    """What becomes of every target of the runs that `in_runs` made, run by run as they end."""
    if not runs:
        return
    like, named = jobs_of(runs[0])[0], {run.name: run for run in runs}
    artifacts = Artifacts(open_store(like.store))
    specs = {name: (run,) for name, run in named.items()}
    queue = run_bounded(
        specs, train, like.at_once, lambda name: started(named[name]), max_retries=like.attempts.driver
    )
    for outcome in queue:
        reasons = outcome.value if isinstance(outcome.value, dict) else {}
        for job in jobs_of(named[outcome.name]):
            artifact, error = artifacts.find(job.stage, job.key), outcome.error
            if artifact is None:
                error = error or TargetFailed(reasons.get(job.name, "its run failed"))
            yield Ended(job.name, artifact, None if artifact else error)


def pack_worker(config: dict[Any, Any]) -> dict[str, str]:
    """The body of one training worker: tracebacks of targets that failed, by name. Rank 0 publishes the others."""
    import torch
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    from farm.fleet.checkpoints import resumed
    from farm.fleet.trunk import borrow_trunk
    from farm.train.packed import fit_packed

    pack: PackJob = config["pack"]
    jobs, first = {job.name: job for job in pack.jobs}, get_context().get_world_rank() == 0
    like = pack.jobs[0]
    torch.set_num_threads(like.num_threads)
    begun: dict[str, float] = {}
    metrics: dict[str, float] = {}

    def started(name: str) -> Callable[[int, int], None] | None:
        begun[name] = time.monotonic()
        if first:
            open_store(like.store).put(config["at"], name.encode())
        return steps_shown(jobs[name])

    def report(_name: str, found: dict[str, float], save: Callable[[Path], None]) -> None:
        metrics.clear()
        metrics.update(found)
        report_checkpoint(found, save)

    def finished(name: str, result: "FitResult", save: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))  # every rank takes part
            if first:
                fitted = {**asdict(result), "metrics": dict(metrics)}
                publish_fitted(jobs[name], Path(folder), fitted, time.monotonic() - begun[name])

    def done(name: str) -> bool:
        # Another run may publish the target between the looks of two workers, who have to keep step.
        said: bool = broadcast_from_rank_zero(first and _is_done(jobs[name]))
        return said

    with resumed(config["start"]) as resume:
        assert like.trunk is not None  # targets are adapted over one
        with borrow_trunk(*like.trunk) as trunk:
            packed = fit_packed(
                [job.task for job in pack.jobs], trunk, done=done,
                report=report, started=started, finished=finished, resume=resume,
            )  # fmt: skip
    return dict(packed.failures)


def drive(pack: PackJob) -> dict[str, str]:
    """Runs until every target is published or has failed; the tracebacks of the latter by name."""
    from ray.train import TrainingFailedError

    from farm.fleet.checkpoints import discard, folder_name

    failures: dict[str, str] = {}
    store = open_store(pack.jobs[0].store)
    while left := [job for job in pack.jobs if job.name not in failures and not _is_done(job)]:
        # With the finished ones, which workers pass over: a driver that is started again finds its run by their keys.
        rest = PackJob(tuple(job for job in pack.jobs if job.name not in failures))
        like = rest.jobs[0]
        at = f"train/{folder_name(rest.run_name, like.own)}/at"  # the target that the run is with
        try:
            result = trainer(like, pack_worker, {"pack": rest, "at": at}, rest.run_name).fit()
        except TrainingFailedError as error:
            name = store.get(at).decode() if store.exists(at) else left[0].name
            failures[name] = str(error)
        else:
            missing = {job.name: "its run ended without it" for job in left if not _is_done(job)}
            failures |= missing | result.return_value
            discard(result)
        store.delete(at)
    return failures


def _is_done(job: TrainJob) -> bool:
    return Artifacts(open_store(job.store)).find(job.stage, job.key) is not None
