"""The benchmark of mixtures: the same requests on both sides, ratios within a repeat."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from farm.bench.decode import Row
from farm.bench.floor import step_bytes
from farm.bench.mixed import (
    BATCH,
    EQUAL_TOKENS,
    WAVES,
    Case,
    Voice,
    _mixture,
    by_bytes,
    measure,
    over_alone,
    table,
    write,
)
from farm.bench.report import origin
from farm.decode.engine import Route
from tests.farm.decode.family import family


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> list[Voice]:
    routes, _ = family(tmp_path_factory.mktemp("family"))
    drafted = [route for route in routes if route.draft is not None]
    return [Voice(route, ((1, 2, 3), (4, 5), (6,))) for route in drafted]


def of(routes: list[Voice], *names: str) -> list[Voice]:
    return [voice for voice in routes if voice.route.target in names]


def test_a_mixture_answers_as_many_requests_as_each_of_its_sides(voices: list[Voice]) -> None:
    *alone, mixture = _mixture("lora", of(voices, "lora0", "lora1"))
    assert [case.num_rows for case in alone] == [(BATCH,), (BATCH,)]
    assert sum(mixture.num_rows) == BATCH
    assert [r.target for r in mixture.requests()] == ["lora0", "lora1"] * (WAVES * BATCH // 2)
    *groups, mixture = _mixture("full", of(voices, "base", "full"))
    assert sorted(r.prompt_ids for case in groups for r in case.requests()) == sorted(
        r.prompt_ids for r in mixture.requests()
    )


def test_every_case_is_measured_in_every_repeat_and_written(voices: list[Voice], tmp_path: Path) -> None:
    every = _mixture("lora", of(voices, "lora0", "lora1"))
    rows: dict[tuple[Case, str], list[Row]] = {}
    for case, row in measure(every, "zoo", 3):
        rows.setdefault((case, row.control), []).append(row)
    assert {len(measured) for measured in rows.values()} == {3}
    assert {row.adapters for row in rows[every[-1], "fixed-4"]} == {2}
    assert table(rows).row_count == 2 * len(every)
    record = json.loads(write(tmp_path, rows, origin("farm bench mixed")).read_text())
    assert record["over_alone"].keys() == {"lora: 2 targets, off", "lora: 2 targets, fixed-4"}
    assert all(0 < ratio["median"] for ratio in record["over_alone"].values())


def test_a_mixture_is_held_against_the_time_of_its_targets_one_after_the_other() -> None:
    """Two groups of four rows at 100 and 50 tokens a second: 66.7 together; a mixture at 60 reaches 0.9 of it."""
    route = Route(None, frozenset())  # type: ignore[arg-type] - nothing is decoded here
    voices = tuple(Voice(replace(route, target=name), ((1,),)) for name in "ab")
    alone = tuple(Case("full", (voice,), (4,)) for voice in voices)
    mixture = Case("full", voices, (4, 4), alone)
    row = Row("zoo", "t", "farm", "off", "none", 8, 2, "equal", "float32", 2, 0, 0.0)
    speeds = {alone[0]: 100.0, alone[1]: 50.0, mixture: 60.0}
    rows = {
        (case, "off"): [replace(row, tokens_per_s=speed / slow) for slow in (1, 2)]
        for case, speed in speeds.items()
    }
    found = over_alone(mixture, "off", rows)
    assert (found.median, found.low, found.high) == pytest.approx((0.9, 0.9, 0.9))
    assert mixture.tokens == 8 * WAVES * EQUAL_TOKENS


def test_weights_alone_allow_a_mixture_what_its_private_parts_leave(voices: list[Voice]) -> None:
    """LoRAs of one checkpoint: it is read once for both; two checkpoints are read once each, as they are alone."""
    lora, full = (
        _mixture("lora", of(voices, "lora0", "lora1"))[-1],
        _mixture("full", of(voices, "base", "full"))[-1],
    )
    assert 0.5 < by_bytes(lora, "off") < 1
    assert by_bytes(full, "off") == pytest.approx(1.0)
    assert by_bytes(full, "fixed-4") > 1.0, "the trunk is read once for both"
    loras = [voice.route.lora for voice in lora.voices]
    alone = step_bytes(lora.voices[0].route.forward)
    sizes = [int(one.flat_EP.count_nonzero()) * one.flat_EP.itemsize for one in loras if one is not None]
    assert by_bytes(lora, "off") == pytest.approx((alone + sum(sizes) / 2) / (alone + sum(sizes)))
