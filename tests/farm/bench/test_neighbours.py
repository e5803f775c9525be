"""Measuring beside busy processes: they are there, they end, and each setting is a process of its own."""

import json
import os
import sys
from pathlib import Path

import pytest

from farm.bench import neighbours
from farm.bench.neighbours import Row, table, write


def test_neighbours_keep_cores_busy_and_end_with_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    popen = neighbours.subprocess.Popen
    monkeypatch.setattr(
        neighbours.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with neighbours.neighbours(2):
        assert [one.poll() for one in started] == [None, None]
    assert all(one.poll() is not None for one in started)


def test_each_setting_is_what_its_own_process_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of this process would be read once for all settings, or by none."""
    program = tmp_path / "program"
    program.write_text(
        f"#!{sys.executable}\nimport json, os\n"
        'spins = int(os.environ.get("GOMP_SPINCOUNT", 0))\n'
        'print(json.dumps([[float(os.environ["OMP_NUM_THREADS"]), 2.0], float(spins)]))\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(neighbours.sys, "executable", str(program))
    monkeypatch.setattr(neighbours, "BUSY", (0,))
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    rows = list(neighbours.measure(tmp_path / "manifest.yaml", 3, "1000"))
    assert rows == [
        Row(None, 3, 0, (3.0, 2.0), 0.0),
        Row("1000", 3, 0, (3.0, 2.0), 1000.0),
        Row(None, 1, 0, (1.0, 2.0), 0.0),
    ]
    assert os.environ["GOMP_SPINCOUNT"] == "5"
    assert table(rows).row_count == 3
    kept = json.loads(write(tmp_path / "out", rows, {"command": "x"}).read_text())
    assert kept["command"] == "x"
    assert len(kept["rows"]) == 3
