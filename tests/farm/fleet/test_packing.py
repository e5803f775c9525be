"""The benchmark of packs: both sides adapt the same targets by an onboarding's runs, and every second is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from farm.artifacts import Artifacts
from farm.bench.report import origin
from farm.fleet.packing import Adapted, adapted, jobs_of, table, together, write
from farm.fleet.trainers import PackJob
from farm.store import open_store
from tests.farm.bench.test_adapt import DEFAULT, onboarded

MEASURED = [Adapted("packed", 2, 20.0, 6.0), Adapted("alone", 1, 14.0, 3.0), Adapted("alone", 1, 16.0, 3.5)]


@pytest.mark.ray
def test_a_family_that_is_too_small_is_adapted_again_under_other_seeds(
    ray_cluster: object, tmp_path: Path
) -> None:
    manifest = onboarded(tmp_path).model_copy(update={"adapt": DEFAULT})
    jobs = jobs_of(manifest, 2, (tmp_path / "jobs").as_uri())
    assert len({job.name for job in jobs}) == len({job.task.settings.seed for job in jobs}) == 2
    assert len({job.task.shards for job in jobs}) == 1
    packed = adapted("packed", jobs, [PackJob(tuple(jobs))])
    assert (packed.how, packed.targets) == ("packed", 2)
    made = [Artifacts(open_store(job.store)).find(job.stage, job.key) for job in jobs]
    parts = [one.manifest["fit_seconds"] for one in made if one is not None]
    assert packed.fit_s == pytest.approx(sum(sum(part.values()) for part in parts))
    assert all(part["steps"] > 0 for part in parts)
    assert packed.fit_s < packed.wall_s


@pytest.mark.ray
def test_a_target_that_cannot_be_adapted_ends_the_benchmark(ray_cluster: object, tmp_path: Path) -> None:
    """A pack goes on without it, and would look fast."""
    job, other = jobs_of(
        onboarded(tmp_path).model_copy(update={"adapt": DEFAULT}), 2, (tmp_path / "jobs").as_uri()
    )
    gone = replace(job, task=replace(job.task, shards=(str(tmp_path / "no-rows.safetensors"),)))
    with pytest.raises(RuntimeError, match="no-rows"):
        adapted("packed", [gone, other], [PackJob((gone, other))])


def test_runs_are_summed_and_what_a_pack_takes_beyond_its_fits_is_told(tmp_path: Path) -> None:
    packed, alone = together(MEASURED)
    assert (packed.wall_s, alone.targets, alone.wall_s, alone.fit_s) == (20.0, 2, 30.0, 6.5)
    assert "0.67 of a run each, and 14 s beyond" in str(table(MEASURED).caption)
    record = json.loads(write(tmp_path, MEASURED, origin("farm bench packed")).read_text())
    assert record["packed_over_alone"] == pytest.approx(2 / 3)
    assert record["beyond_fits_s"] == 14.0
    assert len(record["rows"]) == 3
