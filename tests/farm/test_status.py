"""Progress survives killed runs, concurrent writers and hostile text."""

import io
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from farm.status import (
    StatusBoard,
    latest_run,
    progress_bars,
    read_status,
    status_table,
    unfinished_runs,
    watch,
)
from farm.store import ObjectStore, open_store


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(tmp_path.as_uri())


def shown(statuses: list, **options: object) -> str:
    console = Console(width=300, file=io.StringIO(), color_system=None)
    console.print(status_table(statuses, **options))  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_seconds_of_each_stage_come_from_when_it_started_and_ended(store: ObjectStore) -> None:
    clock = Clock()
    board = StatusBoard(store, "run", clock)
    board.open(["math"])
    clock.now += 7
    board.update("math", stage="probe")
    clock.now += 5
    board.update("math", stage="regenerate", rows_done=0, rows_total=64)
    clock.now += 20
    board.update("math", rows_done=32)
    clock.now += 10
    board.update("math", stage="adapt")
    clock.now += 30
    board.update("math", decision="promoted", version="v1")
    clock.now += 1000
    (record,) = read_status(store, "run")
    assert record.stage_seconds(clock.now) == {"probe": 5, "regenerate": 30, "adapt": 30}
    assert record.finished
    assert record.version == "v1"


def test_rows_belong_to_the_stage_that_counted_them(store: ObjectStore) -> None:
    board = StatusBoard(store, "run")
    board.update("math", stage="regenerate", rows_done=64, rows_total=64)
    board.update("math", stage="regenerate", error="one row failed")
    assert read_status(store, "run")[0].rows_done == 64
    board.update("math", stage="adapt")
    assert read_status(store, "run")[0].rows_done is None


def test_the_pause_after_a_killed_run_is_not_counted_and_its_error_is_gone(store: ObjectStore) -> None:
    clock = Clock()
    board = StatusBoard(store, "run", clock)
    board.update("math", stage="regenerate", error="worker died")
    clock.now += 10
    board.update("math", rows_done=3)
    clock.now += 3600  # killed, submitted again an hour later
    board.open(["math"])
    assert read_status(store, "run")[0].error is None
    board.update("math", stage="regenerate")
    clock.now += 5
    board.update("math", stage="adapt")
    assert read_status(store, "run")[0].stage_seconds() == {"regenerate": 15, "adapt": 0}


def test_no_update_is_lost_when_many_write_at_once(store: ObjectStore) -> None:
    clock = Clock()

    def enter(stage: int) -> None:
        StatusBoard(store, "run", clock).update("math", stage=f"stage-{stage}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(16)))
    assert len(read_status(store, "run")[0].spans) == 16


def test_the_latest_run_is_the_one_that_changed_last(store: ObjectStore) -> None:
    clock = Clock()
    assert latest_run(store) is None
    StatusBoard(store, "b", clock).update("math", stage="probe")
    clock.now += 1
    StatusBoard(store, "a", clock).update("math", stage="probe")
    assert latest_run(store) == "a"
    assert read_status(store, "no-such-run") == []


def test_markup_in_names_and_errors_is_shown_as_it_is(store: ObjectStore) -> None:
    StatusBoard(store, "run").update("[red]math", error="Traceback\n  line\nValueError: [/bold] bad")
    table = shown(read_status(store, "run"))
    assert "[red]math" in table
    assert "ValueError: [/bold] bad" in table
    assert "Traceback" not in table


def test_a_name_with_a_slash_or_dots_never_leaves_the_folder(store: ObjectStore) -> None:
    board = StatusBoard(store, "run")
    for name in ("../../x", "a/b", "/etc/x"):
        with pytest.raises(ValueError, match="/"):
            board.update(name, stage="probe")
    assert store.list("") == []


def test_the_live_version_is_the_registrys_and_a_kept_version_is_never_shown_as_live(
    store: ObjectStore,
) -> None:
    board = StatusBoard(store, "run")
    board.open(["math"])
    assert "v7" in shown(read_status(store, "run"), live={"math": "v7"})
    board.update("math", decision="kept", version="v8")
    assert "v8" not in shown(read_status(store, "run"))
    assert "v8" not in shown(read_status(store, "run"), live={"math": "v7"})
    board.open(["math"])
    board.update("math", decision="promoted", version="v9")
    assert "v9" in shown(read_status(store, "run"))


def test_watching_ends_when_every_target_has_its_decision(store: ObjectStore) -> None:
    board = StatusBoard(store, "run")
    board.open(["a", "b"])
    board.update("a", decision="failed", error="boom")
    waits: list[int] = []

    def live() -> dict[str, str]:
        waits.append(1)
        if len(waits) == 3:
            board.update("b", decision="kept")
        return {}

    output = io.StringIO()
    watch(store, "run", live, console=Console(width=120, file=output), interval_s=0.01)
    assert len(waits) == 4
    assert "kept" in output.getvalue()


def test_a_bar_follows_the_rows_of_each_target_and_goes_with_its_stage(store: ObjectStore) -> None:
    board = StatusBoard(store, "run")
    board.open(["math", "code"])
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    with progress_bars(store, "run", console, interval_s=0.02):
        board.update("math", stage="adapt", rows_done=3, rows_total=8)
        board.update("code", stage="evaluate")
        time.sleep(0.5)
        between = console.file.getvalue()  # type: ignore[attr-defined]
        board.update("math", stage="evaluate")
        time.sleep(0.5)
        console.file.truncate(0)
        time.sleep(0.3)
    assert "math: adapt" in between
    assert "3/8" in between
    assert "code" not in between
    assert "math" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_nothing_is_drawn_where_there_is_no_terminal(store: ObjectStore) -> None:
    console = Console(width=100, file=io.StringIO())
    board = StatusBoard(store, "run")
    with progress_bars(store, "run", console, interval_s=0.02):
        board.update("math", stage="adapt", rows_done=3, rows_total=8)
        time.sleep(0.1)
    assert console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_run_that_decides_nothing_is_forgotten_and_no_other_is(store: ObjectStore) -> None:
    for run_id in ("trunk", "trunk-2"):
        StatusBoard(store, run_id).update("math", stage="trunk")
    StatusBoard(store, "trunk").forget()
    assert read_status(store, "trunk") == []
    assert unfinished_runs(store, 0.0) == ["trunk-2"]


def test_a_record_that_is_forgotten_while_all_are_read_is_left_out(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = StatusBoard(store, "trunk")
    board.update("math", stage="trunk")
    keys = store.list("status/trunk/")
    monkeypatch.setattr(type(store), "list", lambda *_: keys)
    board.forget()
    assert read_status(store, "trunk") == []
