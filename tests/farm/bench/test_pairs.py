"""Pairs are measured in turn, their ratios within a repeat, and what comes of it can be read."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from farm.bench.pairs import Pair, measure, table, write
from farm.bench.report import origin


def test_the_first_side_takes_turns_and_the_ratio_is_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the two sides move: ours takes 1 s, the library 3 s, both twice as long from repeat 2 on."""
    clock, order = [0.0], []

    def side(name: str, seconds: float) -> torch.Tensor:
        order.append(name)
        clock[0] += seconds * (2 if len(order) > 6 else 1)
        return torch.ones(1)

    monkeypatch.setattr("farm.bench.pairs.time.perf_counter", lambda: clock[0])
    pair = Pair("op", "", "", "float32", lambda: side("library", 3.0), lambda: side("ours", 1.0), calls=2)
    row = measure(pair, "m", 4)
    assert order[2:] == ["library", "ours", "ours", "library"] * 2
    assert (row.speedup.median, row.speedup.low, row.speedup.high) == (3.0, 3.0, 3.0)
    assert (row.library_s, row.ours_s, row.difference) == (2.25, 0.75, 0.0)


def test_rows_are_shown_and_written_with_where_they_come_from(tmp_path: Path) -> None:
    ones = partial(torch.ones, 2)
    same = Pair("forward", "context 200", "1 x 1 tokens", "float32", ones, ones)
    rows = [measure(same, "zoo", 3)]
    assert table(rows).row_count == 1
    record = json.loads(write(tmp_path / "bench", rows, origin("farm bench operators")).read_text())
    assert {"command", "git_sha", "versions", "hardware", "rows"} == record.keys()
    assert record["rows"][0]["speedup"].keys() == {"median", "low", "high"}
