"""Training runs: one Ray Train run with DeepSpeed inside for each private expert, and one for the trunk.

`fit()` blocks its caller, so every run is driven by a task of its own. The task's process ends with it,
because dead runs leave actors behind in a process that lives on.
"""

import hashlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from farm.artifacts import Artifact, Artifacts
from farm.fleet.session import WORKER_VARIABLES
from farm.fleet.stage_keys import ADAPT, EXPERT_FILE, TRUNK_FILES
from farm.resources import AdaptResources
from farm.status import StatusBoard
from farm.store import open_store

if TYPE_CHECKING:
    from farm.train.loop import FitTask

CURVE_FILE = "curve.json"
STATUS_EVERY_S = 1.0
RUN_VARIABLE = "FARM_RUN"  # names the run in its workers' environment, for whoever looks at the processes


@dataclass(frozen=True)
class Attempts:
    """How often a run is tried again from its last checkpoint before its target has failed."""

    worker: int = 2  # deaths of a training worker
    driver: int = 1  # deaths of the task that drives the run


@dataclass(frozen=True)
class TrainJob:
    """One run: what is fitted, under which artifact key it is published, and what is recorded with it."""

    name: str  # the target, or the base for a trunk
    stage: Literal["adapt", "trunk"]
    key: str
    task: "FitTask"
    store: str  # URI
    trunk: tuple[str, str] | None  # revision and file of the frozen trunk; None: it is what is trained
    resources: AdaptResources
    attempts: Attempts
    record: Mapping[str, Any]  # goes into the artifact's manifest
    at_once: int = 1  # runs side by side
    # Run id and targets on whose records its steps are shown.
    shown_as: tuple[str, tuple[str, ...]] | None = None
    # Marks the run's folder. It travels with the job, so that a driver that is started again finds it.
    own: str = field(default_factory=lambda: secrets.token_hex(4))

    @property
    def num_threads(self) -> int:
        """Of one worker: the cores, shared by the workers that run at the same time."""
        return max(1, (os.cpu_count() or 1) // (self.resources.workers * self.at_once))

    @property
    def run_name(self) -> str:
        """A run goes on from one of the same name, so the name holds everything that decides the result.

        A trunk's key may leave its prompts out, and so does not say on which answers its checkpoints were trained.
        """
        name = f"{self.stage}-{self.name}-{self.key}"
        return name if self.stage == ADAPT else f"{name}-{self.record['answers_key']}"


@dataclass(frozen=True)
class PackJob:
    """Several targets in one run, one after the other; of one store, one trunk, the same resources and attempts."""

    jobs: tuple[TrainJob, ...]

    @property
    def name(self) -> str:
        """Of its targets, for a list of tasks."""
        return ", ".join(job.name for job in self.jobs)

    @property
    def run_name(self) -> str:
        """Holds everything that decides the results."""
        return f"pack-{hashlib.sha256(' '.join(job.key for job in self.jobs).encode()).hexdigest()[:16]}"


def train_worker(config: dict[Any, Any]) -> Any:
    """The body of one training worker; rank 0's return value becomes the run's."""
    import torch

    from farm.fleet.checkpoints import resumed
    from farm.fleet.trunk import borrow_trunk
    from farm.train.loop import fit

    job: TrainJob = config["job"]
    task, trunk_file = job.task, job.trunk
    torch.set_num_threads(job.num_threads)
    options = {"report": report_checkpoint, "steps_done": steps_shown(job)}
    with resumed(config["start"]) as resume:
        if trunk_file is None:
            result = fit(task, trunk=None, resume=resume, **options)
        else:
            with borrow_trunk(*trunk_file) as trunk:
                result = fit(task, trunk=trunk, resume=resume, **options)
    return asdict(result)


def steps_shown(job: TrainJob) -> Callable[[int, int], None] | None:
    """Writes the steps that rank 0 has taken to the status records, at most one write in STATUS_EVERY_S.

    A record that cannot be written is left as it was.
    """
    from ray.train import get_context

    if job.shown_as is None or get_context().get_world_rank() != 0:
        return None
    run_id, targets = job.shown_as
    board, written = StatusBoard(open_store(job.store), run_id), -STATUS_EVERY_S

    def show(done: int, of: int) -> None:
        nonlocal written
        if done < of and time.monotonic() - written < STATUS_EVERY_S:
            return
        written = time.monotonic()
        for target in targets:
            with suppress(OSError, ValueError):  # nobody trains for the sake of what is shown
                board.update(target, rows_done=done, rows_total=of)

    return show


def report_checkpoint(metrics: dict[str, float], save: Callable[[Path], None] | None) -> None:
    """Every rank reports; rank 0's folder is the checkpoint, though all ranks take part in writing it."""
    from ray.train import Checkpoint, get_context, report

    if save is None:
        report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        first = get_context().get_world_rank() == 0
        report(metrics, checkpoint=Checkpoint.from_directory(folder) if first else None)


@ray.remote(num_cpus=0, max_calls=1, runtime_env={"env_vars": WORKER_VARIABLES})
def train(job: TrainJob | PackJob) -> Artifact | dict[str, str]:
    """Drive one run to its end and publish its last checkpoint as the artifact of `job.stage`.

    Of several targets: publish those that end well, and return the reasons of those that did not, by name. Run again
    after it was killed, it goes on from the last checkpoint, or finds the finished artifacts.
    """
    if isinstance(job, PackJob):
        from farm.fleet.packs import drive

        return drive(job)
    artifacts = Artifacts(open_store(job.store))
    found = artifacts.find(job.stage, job.key)
    if found:
        return found
    from farm.fleet.checkpoints import discard

    started = time.monotonic()
    result = trainer(job, train_worker, {"job": job}, job.run_name).fit()
    assert result.checkpoint is not None  # the last report of `fit` always saves
    with result.checkpoint.as_directory() as folder:
        fitted = {**result.return_value, "metrics": result.metrics}
        finished = publish_fitted(job, Path(folder), fitted, time.monotonic() - started)
    discard(result)
    return finished


def publish_fitted(job: TrainJob, folder: Path, fitted: Mapping[str, Any], seconds: float) -> Artifact:
    """The artifact of a run whose last checkpoint is in `folder`; `fitted` has the fields of a FitResult, and more.

    Its manifest says both what the target took in all, `seconds`, and where the training loop's time went.
    """
    artifacts = Artifacts(open_store(job.store))
    names = (EXPERT_FILE,) if job.stage == ADAPT else TRUNK_FILES
    files: dict[str, bytes | Path] = {name: folder / name for name in names}
    files[CURVE_FILE] = json.dumps(fitted["curve"]).encode()
    rest = {name: value for name, value in fitted.items() if name not in ("curve", "seconds")}
    took = {"seconds": seconds, "loop_seconds": fitted["seconds"]}
    return artifacts.write(job.stage, job.key, files, {**job.record, **rest, **took})


def trainer(like: TrainJob, worker: Callable[[Any], Any], config: dict[str, Any], run_name: str) -> Any:
    """A run of `worker` with the resources and attempts of `like`, in the folder of `like.own`.

    `config` gets a `start`, see `farm.fleet.checkpoints`.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from farm.fleet.checkpoints import folder_name, take_over

    start = take_over(open_store(like.store), run_name, like.own)
    resources, on_gpu = like.resources, like.resources.gpus_per_worker > 0
    variables = {RUN_VARIABLE: run_name}
    if not on_gpu:
        variables["DS_ACCELERATOR"] = "cpu"
    each = {"CPU": 1.0, **({"GPU": resources.gpus_per_worker} if on_gpu else {})}
    return TorchTrainer(
        worker,
        train_loop_config={**config, "start": start},
        scaling_config=ScalingConfig(
            num_workers=resources.workers, use_gpu=on_gpu, resources_per_worker=each
        ),
        run_config=RunConfig(
            name=folder_name(run_name, like.own),
            storage_path=f"{like.store}/train",
            failure_config=FailureConfig(max_failures=like.attempts.worker),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": variables},
        ),
    )
