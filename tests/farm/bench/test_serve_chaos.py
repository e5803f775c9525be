"""Chaos on a copy: the store that serves others stays as it is, and only what a killed replica had may be lost."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from farm.bench.serve_chaos import Chaos, copied, folder_of
from farm.bench.serve_child import check_port_is_free, died, serving
from farm.bench.serve_client import Answer, Ask
from farm.bench.serve_load import Window
from farm.bench.serve_report import table, write
from farm.errors import UserError
from farm.registry import Registry
from farm.store import open_store

SOLOS = {("a", 0): "the cat sat", ("b", 0): "the dog ran"}


def answer(started_s: float, ended_s: float, version: str = "a@v1", error: str | None = None) -> Answer:
    asked = Ask("a", 0, (), 8)
    text = "the cat sat" if error is None else "the"
    return Answer(asked, started_s, 200, None, error, text, 3, {version}, [started_s], ended_s)


def test_a_copied_store_changes_alone(tmp_path):
    store = (tmp_path / "store").as_uri()
    registry = Registry(open_store(store))
    registry.publish("a", {"expert.safetensors": b"1"}, {})
    assert registry.promote("a", "v1", None)
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    with copied(store, tmp_path / "copy") as copy:
        other = Registry(open_store(copy))
        assert other.live("a").version == "v1"
        other.publish("a", {"expert.safetensors": b"2"}, {})
        assert other.promote("a", "v2", "v1")
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before
    assert not (tmp_path / "copy").exists()


def test_a_store_that_is_no_folder_cannot_be_taken_away():
    with pytest.raises(UserError, match="folder"):
        folder_of("s3://bucket/store")


def test_only_requests_that_were_open_at_the_kill_are_lost_with_it():
    chaos = Chaos(None, None, "", "a")  # type: ignore[arg-type] - only counts
    chaos.events = [
        {"event": "promote", "at_s": 12.0, "version": "v2", "before": "v1"},
        {"event": "rollback", "at_s": 20.0, "version": "v1", "before": "v2"},
        {"event": "kill", "at_s": 30.0},
    ]
    answers = [
        answer(11.0, 12.5),
        answer(13.0, 14.0),  # sent a second after the promotion, and still the old version
        answer(14.5, 15.0, "a@v2"),
        answer(19.5, 22.0),  # waited until v1 was live again
        answer(21.0, 22.0),
        answer(41.0, 42.0, "a@base"),  # nobody made that live
        answer(29.0, 30.1, error="the replica was lost"),
        answer(31.0, 31.2, error="the replica was lost"),  # sent after the kill: not excused
    ]
    found = chaos._record(answers, Window(10.0, 40.0), 30.0, SOLOS)
    assert (found["lost_with_replica"], found["errors"], found["wrong_model"]) == (1, 1, 0)
    promoted = found["events"][0]
    assert (promoted["old_until_s"], promoted["new_from_s"], promoted["at_s"]) == (1.0, 2.5, 2.0)
    rolled_back = found["events"][1]
    assert (rolled_back["old_until_s"], rolled_back["new_from_s"]) == (0.0, 1.0)
    assert found["versions"] == ["a@base", "a@v1", "a@v2"]
    assert found["unexpected_versions"] == ["a@base"]


def test_a_child_that_ends_by_itself_is_shown_by_its_last_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no checkout: `farm serve` refuses
    with serving([], tmp_path / "serve.log") as child:
        assert any(one.pid == child.process.pid for one in child.processes())
        while child.is_alive:
            time.sleep(0.05)
        assert "runs from the checkout" in str(died(child))
    assert child.processes() == []


def test_a_benchmark_that_is_ended_ends_the_endpoint_it_started(tmp_path):
    """Else the next one would measure it."""
    program = f"""
import subprocess, sys, time
from pathlib import Path
from farm.bench import serve_child
serve_child.COMMAND = [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"]
with serve_child.serving([], Path({str(tmp_path / "log")!r})) as child:
    print(child.process.pid, flush=True)
    time.sleep(60)
"""
    bench = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert bench.stdout is not None
    child = int(bench.stdout.readline())
    bench.terminate()
    bench.wait(30)
    bench.stdout.close()
    assert not Path(f"/proc/{child}").exists()


def test_a_port_that_somebody_answers_on_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="serve.port"):
            check_port_is_free(taken.getsockname()[1])
        port = taken.getsockname()[1]
    check_port_is_free(port)


def test_a_record_is_written_and_shown_whole(tmp_path: Path):
    spread = {"p50": 1.0, "p95": 2.0, "p99": None}
    load = {
        "requests": 10, "completed": 9, "rejected_429": 1, "errors": 0, "wrong_model": 0,
        "tokens_per_s": 5.0, "ttft_ms": spread, "itl_ms": spread,
    }  # fmt: skip
    record = {
        **load, "clients": 2, "adapters": 3, "open_loop": load, "chaos": load, "cpu_share": {"client": 0.5},
        "engine_tokens_per_s": 10.0, "over_engine": 0.5,
    }  # fmt: skip
    files = write(tmp_path, record, {"command": "farm bench serve"})
    assert json.loads(files[0].read_text())["command"] == "farm bench serve"
    assert files[1].stat().st_size > 5000
    assert table(record).row_count == 3
