"""Many small targets in one Ray Train run: its processes and groups start once.

A target is published as soon as it is fitted. One that fails is left out; where it takes the whole run with it, the
rest go on in another one.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.artifacts import Artifacts
from farm.fleet.trainers import (
    PackJob,
    TrainJob,
    publish_fitted,
    report_checkpoint,
    steps_shown,
    trainer,
)
from farm.store import open_store

if TYPE_CHECKING:
    from farm.train.loop import FitResult

# Of a private expert: its training takes about as long as a run's processes take to start.
SMALL_BYTES = 64 * 2**20


def divide(
    jobs: Sequence[TrainJob], at_once: int, most: int | None, expert_bytes: int
) -> list[PackJob | TrainJob]:
    """The runs of some jobs: at most `most` targets in one; None: as many as fill `at_once` runs, if they are small."""
    if most is None:
        most = -(-len(jobs) // at_once) if expert_bytes <= SMALL_BYTES else 1
    num_runs = -(-len(jobs) // most)
    groups = [tuple(jobs[number::num_runs]) for number in range(num_runs)]
    return [PackJob(group) if len(group) > 1 else group[0] for group in groups]


def pack_worker(config: dict[Any, Any]) -> dict[str, str]:
    """The body of one training worker: why targets failed, by name. Rank 0 publishes those that did not."""
    import torch
    from ray.train import get_checkpoint, get_context

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
                seconds = time.monotonic() - begun[name]
                publish_fitted(
                    jobs[name], Path(folder), {**asdict(result), "metrics": dict(metrics), "seconds": seconds}
                )

    checkpoint = get_checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        resume = Path(checkpoint.to_directory(folder)) if checkpoint else None
        assert like.trunk is not None  # targets are adapted over one
        with borrow_trunk(*like.trunk) as trunk:
            packed = fit_packed(
                [job.task for job in pack.jobs], trunk, done=lambda name: _is_done(jobs[name]),
                report=report, started=started, finished=finished, resume=resume,
            )  # fmt: skip
    return dict(packed.failures)


def drive(pack: PackJob) -> dict[str, str]:
    """Runs until every target is published or has failed; the reasons of the latter by name."""
    from ray.train import TrainingFailedError

    failures: dict[str, str] = {}
    store = open_store(pack.jobs[0].store)
    while left := [job for job in pack.jobs if job.name not in failures and not _is_done(job)]:
        rest = PackJob(tuple(left))
        at = f"train/{rest.run_name}.at"  # the target that the run is with
        try:
            result = trainer(left[0], pack_worker, {"pack": rest, "at": at}, rest.run_name).fit()
        except TrainingFailedError as error:
            name = store.get(at).decode() if store.exists(at) else left[0].name
            failures[name] = str(error).strip().splitlines()[0]
        else:
            missing = {job.name: "its run ended without it" for job in left if not _is_done(job)}
            failures |= missing | result.return_value
            result.filesystem.delete_dir(result.path)  # optimizer states of finished targets serve nobody
        store.delete(at)
    return failures


def _is_done(job: TrainJob) -> bool:
    return Artifacts(open_store(job.store)).find(job.stage, job.key) is not None
