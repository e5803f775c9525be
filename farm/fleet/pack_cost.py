"""The runs of `farm bench packed`: an onboarding's, over what it left in the store, into a store of their own."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Literal

from pyarrow.fs import FileSystem

from farm.artifacts import TRUNK, Artifact, Artifacts
from farm.bench.packed import Cost, Side, Trained
from farm.config import Manifest, UserError
from farm.evaluate.templates import with_templates
from farm.fleet.answers import ANSWERS
from farm.fleet.chosen import SELECT
from farm.fleet.onboard import new_run_id
from farm.fleet.packs import fit_runs, in_runs, jobs_of
from farm.fleet.plan import make_plan
from farm.fleet.pool import describe
from farm.fleet.records import TargetPlan
from farm.fleet.run import Run
from farm.fleet.session import check_cluster
from farm.fleet.stages import adapt_jobs
from farm.fleet.trainers import Attempts, TrainJob
from farm.fleet.trunk import close_trunk
from farm.store import open_store
from farm.target.load import target_digest

Say = Callable[[str], None]
# A run that died and went on would be measured as a slow one.
ONCE = Attempts(worker=0, driver=0)


def onboarded_jobs(manifest: Manifest, say: Say) -> list[TrainJob]:
    """What an onboarding would adapt each target by of which the store has the answers; needs no Ray.

    Raises UserError when the store lacks the trunk, or the answers of every target.
    """
    store = open_store(manifest.store)
    plan = make_plan(with_templates(manifest), Artifacts(store), target_digest)
    run = Run(new_run_id(), plan, store, say, ONCE)
    trunk = run.artifacts.find(TRUNK, plan.trunk.key)
    ready = [target for target in plan.targets if _find_inputs(run, target)]
    if trunk is None or not ready:
        what = "trunk" if trunk is None else "answers"
        raise UserError(f"{store.uri}: has no {what} of this family; run `farm onboard` with it first")
    return adapt_jobs(run, trunk, ready)


def in_turn(jobs: Sequence[TrainJob], count: int) -> list[TrainJob]:
    """`count` jobs with a name of their own each: these in turn, under the next seed each time round."""
    found = []
    for number in range(count):
        job, task = jobs[number % len(jobs)], jobs[number % len(jobs)].task
        name = f"{number + 1:02d}-{job.name}"
        task = replace(
            task,
            target=task.target.model_copy(update={"name": name}),
            settings=task.settings.model_copy(update={"seed": task.settings.seed + number // len(jobs)}),
        )
        # A key says what was made of what, which here is the number's business too: nothing may be found again.
        key = f"{job.key}-{number + 1:02d}"
        found.append(replace(job, name=name, key=key, task=task, shown_as=None))
    return found


def measure(manifest: Manifest, jobs: Sequence[TrainJob], say: Say) -> Cost:
    """Fits all jobs in one run, then each in a run of its own, as many side by side as the manifest asks for.

    The pack comes first, so that whatever the machine reads only once counts against it. Needs a connected cluster.
    Raises RuntimeError when a target fails, UserError when the cluster cannot place a run.
    """
    check_cluster(manifest)
    resources = manifest.resources.adapt
    one_run = resources.model_copy(update={"pack": len(jobs), "parallel": 1})
    own_runs = resources.model_copy(update={"pack": 1})
    with _store_below(manifest.store) as store:
        packed = [replace(job, store=f"{store}/packed", resources=one_run) for job in jobs]
        runs = [replace(job, store=f"{store}/runs", resources=own_runs) for job in jobs]
        return Cost(_side("packed", packed, say), _side("runs", runs, say))


def _side(kind: Literal["packed", "runs"], jobs: Sequence[TrainJob], say: Say) -> Side:
    artifacts: dict[str, Artifact] = {}
    started = time.monotonic()
    runs = in_runs(jobs)
    like = jobs_of(runs[0])[0]
    assert like.trunk is not None  # targets are adapted over one
    try:
        for ended in fit_runs(runs, lambda run: say(f"{run.name}: adapting")):
            if ended.artifact is None:
                assert ended.error is not None
                raise RuntimeError(f"{ended.name}: {describe(ended.error)}") from ended.error
            artifacts[ended.name] = ended.artifact
        wall_s = time.monotonic() - started
    finally:
        close_trunk(like.trunk[0])
    trained = tuple(_trained(job, artifacts[job.name]) for job in jobs)
    return Side(kind, len(runs), like.at_once, like.resources.workers, like.num_threads, wall_s, trained)


def _trained(job: TrainJob, artifact: Artifact) -> Trained:
    made = artifact.manifest
    return Trained(
        name=job.name, data=made["target"], seed=job.task.settings.seed, steps=made["steps"],
        positions=made["positions"], loop_s=sum(made["loop_seconds"].values()), seconds=made["seconds"],
    )  # fmt: skip


def _find_inputs(run: Run, target: TargetPlan) -> bool:
    """Whether the store has what the target was, or would be, adapted on."""
    answers = run.artifacts.find(ANSWERS, target.answers.key)
    if answers is None:
        return False
    run.answers[target.name] = answers
    if target.select_key is None or run.manifest.select.before:
        return True  # answers to prompts that were chosen are all adapted on
    chosen = run.artifacts.find(SELECT, target.select_key)
    if chosen is not None:
        run.selections[target.name] = chosen
    return chosen is not None


@contextmanager
def _store_below(uri: str) -> Iterator[str]:
    """The URI of a store that ends with the block, where every node of a cluster reaches it as it does the other."""
    below = f"{open_store(uri).uri}/bench-{new_run_id()}"
    try:
        yield below
    finally:
        filesystem, path = FileSystem.from_uri(below)
        with suppress(FileNotFoundError):  # ended before anything was written
            filesystem.delete_dir(path)
