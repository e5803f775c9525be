"""The benchmark of packs: both sides adapt the same targets by an onboarding's runs, and every second is counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from farm.bench.report import origin
from farm.fleet.packing import Adapted, jobs_of, measure, table, together, write
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
    said: list[str] = []
    packed, *alone = measure(manifest, 2, said.append)
    assert (packed.how, packed.targets) == ("packed", 2)
    assert [(one.how, one.targets) for one in alone] == [("alone", 1)] * 2
    assert all(0 < one.fit_s < one.wall_s for one in (packed, *alone))
    assert packed.wall_s < sum(one.wall_s for one in alone), "its processes start once"
    assert len(said) == 3


def test_runs_are_summed_and_what_a_pack_takes_beyond_its_fits_is_told(tmp_path: Path) -> None:
    packed, alone = together(MEASURED)
    assert (packed.wall_s, alone.targets, alone.wall_s, alone.fit_s) == (20.0, 2, 30.0, 6.5)
    assert "0.67 of a run each, and 14 s beyond" in str(table(MEASURED).caption)
    record = json.loads(write(tmp_path, MEASURED, origin("farm bench packed")).read_text())
    assert record["packed_over_alone"] == pytest.approx(2 / 3)
    assert record["beyond_fits_s"] == 14.0
    assert len(record["rows"]) == 3
