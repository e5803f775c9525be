"""`farm bench packed`: many targets adapted in one run beside a run each, by the trainers of an onboarding."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import ray
from rich.table import Table

from farm.artifacts import Artifacts
from farm.config import Manifest, UserError
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE, read_config, read_tensors, split_vocabulary
from farm.evaluate.published import Published, spec_of
from farm.fleet.answers import ANSWERS, feature_shards
from farm.fleet.plan import ADAPT
from farm.fleet.trainers import Attempts, PackJob, TrainJob, train
from farm.fleet.trunk import close_trunk
from farm.store import open_store
from farm.train.loop import FitTask

ALLOWED_S = 45.0  # that a pack may take beyond what its targets' fits take together


@dataclass(frozen=True)
class Adapted:
    """Some targets, adapted: seconds from asking Ray to the last artifact, and those inside of the fits alone."""

    how: Literal["packed", "alone"]
    targets: int
    wall_s: float
    fit_s: float  # features cached, reference, steps; summed over the targets


def jobs_of(manifest: Manifest, count: int, store: str) -> list[TrainJob]:
    """A job for each of `count` targets with a live adapter, which it is made of again.

    Where the family has fewer, its targets are taken again and again, under other seeds: what is measured is the cost,
    and that is theirs. Artifacts go to `store`. Raises UserError when no target has a live adapter.
    """
    published, artifacts = Published.of(manifest.store), Artifacts(open_store(manifest.store))
    vocabulary = split_vocabulary(read_tensors(published.trunk_folder / TRUNK_FILE))[1]
    like = FitTask(
        kind="expert", settings=manifest.adapt, draft=read_config(published.trunk_folder),
        target=manifest.targets[0], shards=(), expert=str(published.trunk_folder / EXPERT_FILE),
        vocabulary=None if vocabulary is None else tuple(map(int, vocabulary)), rows=None, dtype=manifest.dtype,
    )  # fmt: skip
    tasks: list[FitTask] = []
    for spec in manifest.targets:
        live = published.registry.live(spec.name)
        found = None if live is None else artifacts.find(ANSWERS, live.card["answers_key"])
        if found is not None:
            shards = feature_shards(found, artifacts)
            tasks.append(replace(like, target=spec_of(manifest, spec.name), shards=shards))
    if not tasks:
        raise UserError(f"{manifest.store}: no target has a live adapter; run `farm onboard` first")
    trunk = published.trunk_key, str(published.trunk_folder / TRUNK_FILE)
    jobs = []
    for number, task in enumerate(itertools.islice(itertools.cycle(tasks), count)):
        name = f"{task.target.name}-{number}"
        seeded = replace(
            task, target=task.target.model_copy(update={"name": name}),
            settings=task.settings.model_copy(update={"seed": task.settings.seed + number // len(tasks)}),
        )  # fmt: skip
        jobs.append(
            TrainJob(
                name=name, stage=ADAPT, key=name, task=seeded, store=store, trunk=trunk,
                resources=manifest.resources.adapt, attempts=Attempts(), record={},
            )
        )  # fmt: skip
    return jobs


def measure(manifest: Manifest, count: int, say: Callable[[str], None]) -> Iterator[Adapted]:
    """All targets in one run, then each in its own, one run at a time; a first one warms the machine up.

    Needs a connected cluster. Raises RuntimeError when a target could not be adapted.
    """
    with TemporaryDirectory() as folder:
        stores = [(Path(folder) / name).as_uri() for name in ("warm", "packed", "alone")]
        warm, packed, alone = (
            jobs_of(manifest, num, store) for num, store in zip((1, count, count), stores, strict=True)
        )
        adapted("alone", warm, warm)
        try:
            say(f"{count} targets in one run")
            yield adapted("packed", packed, [PackJob(tuple(packed))])
            for job in alone:
                say(f"{job.name} in a run of its own")
                yield adapted("alone", [job], [job])
        finally:
            close_trunk(packed[0].trunk[0])


def adapted(
    how: Literal["packed", "alone"], jobs: Sequence[TrainJob], runs: Sequence[PackJob | TrainJob]
) -> Adapted:
    """The seconds of `runs`, one behind the other, and of the fits of `jobs` in them.

    Raises RuntimeError when a target could not be adapted.
    """
    started = time.monotonic()
    for run in runs:
        failures = ray.get(train.remote(run))
        if isinstance(failures, dict) and failures:
            raise RuntimeError("; ".join(f"{name}: {reason}" for name, reason in failures.items()))
    wall_s, fit_s = time.monotonic() - started, 0.0
    for job in jobs:
        made = Artifacts(open_store(job.store)).find(job.stage, job.key)
        assert made is not None
        fit_s += sum(made.manifest["fit_seconds"].values())
    return Adapted(how, len(jobs), wall_s, fit_s)


def together(measured: Sequence[Adapted]) -> list[Adapted]:
    """One for each way, over all its runs."""
    found = []
    for how in ("packed", "alone"):
        runs = [one for one in measured if one.how == how]
        found.append(
            Adapted(
                how,
                sum(one.targets for one in runs),
                sum(one.wall_s for one in runs),
                sum(one.fit_s for one in runs),
            )
        )
    return found


def table(measured: Sequence[Adapted]) -> Table:
    """Both ways, and what starting runs costs in each."""
    packed, alone = together(measured)
    beyond = packed.wall_s - packed.fit_s
    out = Table(
        caption=f"a run of all takes {packed.wall_s / alone.wall_s:.2f} of a run each, and {beyond:.0f} s beyond its "
        f"fits ({ALLOWED_S:.0f} s allowed)"
    )
    for heading in ("targets", "runs", "seconds", "of that in fits", "a target"):
        out.add_column(heading, justify="right")
    for one, runs in ((packed, 1), (alone, alone.targets)):
        out.add_row(
            str(one.targets),
            str(runs),
            f"{one.wall_s:.1f}",
            f"{one.fit_s:.1f}",
            f"{one.wall_s / one.targets:.1f}",
        )
    return out


def write(folder: Path, measured: Sequence[Adapted], source: dict[str, Any]) -> Path:
    """packed.json; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    packed, alone = together(measured)
    record = {
        **source, "packed_over_alone": packed.wall_s / alone.wall_s, "beyond_fits_s": packed.wall_s - packed.fit_s,
        "rows": [asdict(one) for one in measured],
    }  # fmt: skip
    path = folder / "packed.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
