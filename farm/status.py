"""How far each target of a run is: one small record a target, in the store.

Whoever can read the store can read the progress; no actor has to be alive to answer.
Layout: `status/<run_id>/<target>.json`.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from farm.sections import Strict
from farm.store import NotFound, ObjectStore

WAITING = "waiting"
DECISION_STYLES: Mapping[str, str] = {
    "promoted": "bold green",
    "kept": "yellow",
    "skipped": "cyan",
    "refused": "bold magenta",
    "failed": "bold red",
}
_SWAP_ATTEMPTS = 50


class StageSpan(Strict):
    """One stretch of work on a stage, in seconds since the epoch. A resumed stage has several."""

    stage: str
    started: float
    finished: float | None = None


class TargetStatus(Strict):
    """What is known of one target in one run. `rows_*` belong to the current stage: prompts, or training steps."""

    run_id: str
    target: str
    stage: str = WAITING
    rows_done: int | None = None
    rows_total: int | None = None
    error: str | None = None
    version: str | None = None
    decision: str | None = None
    spans: tuple[StageSpan, ...] = ()
    updated: float = 0.0

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to this target in this run."""
        return self.decision is not None

    def stage_seconds(self, now: float | None = None) -> dict[str, float]:
        """Seconds by stage in order; the open one counts up to `now` (default: the last update)."""
        end = self.updated if now is None else now
        seconds: dict[str, float] = {}
        for span in self.spans:
            stretch = (end if span.finished is None else span.finished) - span.started
            seconds[span.stage] = seconds.get(span.stage, 0.0) + max(stretch, 0.0)
        return seconds


class StatusBoard:
    """Writes the records of one run, from any process; concurrent updates of a target are all kept."""

    def __init__(self, store: ObjectStore, run_id: str, clock: Callable[[], float] = time.time) -> None:
        self._store, self._run_id, self._clock = store, run_id, clock

    def open(self, targets: Iterable[str]) -> None:
        """Show these targets as waiting, with no error and no decision.

        A stage that a killed run left open ends at that run's last update, so that the pause is not counted.
        """
        for target in targets:
            self._swap(target, lambda record: _ended(record, record.updated).model_copy(update=_FRESH))

    def update(
        self,
        target: str,
        *,
        stage: str | None = None,
        rows_done: int | None = None,
        rows_total: int | None = None,
        error: str | None = None,
        version: str | None = None,
        decision: Literal["promoted", "kept", "skipped", "refused", "failed"] | None = None,
    ) -> TargetStatus:
        """Change what is given, keep the rest; returns the record as written.

        Another `stage` ends the one before and clears its rows; a `decision` ends the target.
        """
        given = {
            "rows_done": rows_done,
            "rows_total": rows_total,
            "error": error,
            "version": version,
            "decision": decision,
        }

        def change(record: TargetStatus) -> TargetStatus:
            now = self._clock()
            if stage is not None and (stage != record.stage or not _is_open(record)):
                span = StageSpan(stage=stage, started=now)
                record = _ended(record, now)
                record = record.model_copy(
                    update={
                        "stage": stage,
                        "spans": (*record.spans, span),
                        "rows_done": None,
                        "rows_total": None,
                    }
                )
            if decision is not None:
                record = _ended(record, now)
            return record.model_copy(update={key: value for key, value in given.items() if value is not None})

        return self._swap(target, change)

    def forget(self) -> None:
        """Delete the run's records: for one that decides no target, whose records would never end."""
        for key in self._store.list(f"status/{self._run_id}/"):
            self._store.delete(key)

    def _swap(self, target: str, change: Callable[[TargetStatus], TargetStatus]) -> TargetStatus:
        key = _key(self._run_id, target)
        for _ in range(_SWAP_ATTEMPTS):
            try:
                data, etag = self._store.get_with_etag(key)
                record = TargetStatus.model_validate_json(data)
            except NotFound:
                etag, record = None, TargetStatus(run_id=self._run_id, target=target)
            record = change(record).model_copy(update={"updated": self._clock()})
            if self._store.compare_and_swap(key, record.model_dump_json(indent=1).encode(), etag):
                return record
        raise TimeoutError(f"{self._store.uri}/{key}: changed by others {_SWAP_ATTEMPTS} times in a row")


def read_status(store: ObjectStore, run_id: str) -> list[TargetStatus]:
    """The records of a run, sorted by target; empty for a run that is not known."""
    keys = [key for key in store.list(f"status/{run_id}/") if key.endswith(".json")]
    return _records(store, keys)


def latest_run(store: ObjectStore) -> str | None:
    """The run whose records changed last; None if the store has seen no run."""
    runs = {key.split("/")[1] for key in store.list("status/") if key.count("/") == 2}
    changed = {run: max((record.updated for record in read_status(store, run)), default=0.0) for run in runs}
    return max(changed, key=lambda run: changed[run]) if changed else None


def unfinished_runs(store: ObjectStore, since: float) -> list[str]:
    """Runs with an undecided target whose record changed at or after `since`, in seconds since the epoch."""
    recent = [
        entry.key
        for entry in store.entries("status/")
        if entry.modified >= since and entry.key.count("/") == 2 and entry.key.endswith(".json")
    ]
    return sorted({record.run_id for record in _records(store, recent) if not record.finished})


def _records(store: ObjectStore, keys: Iterable[str]) -> list[TargetStatus]:
    """Those of the keys that are still there."""
    records = []
    for key in keys:
        with suppress(NotFound):
            records.append(TargetStatus.model_validate_json(store.get(key)))
    return records


def status_table(
    statuses: Iterable[TargetStatus], live: Mapping[str, str] | None = None, now: float | None = None
) -> Table:
    """The records as a rich table.

    `live`: the live version by target, from the registry; without it, what the run promoted is shown.
    Names and errors are plain text: console markup in them has no effect. Of an error the last line is shown.
    """
    table = Table()
    table.add_column("target", overflow="fold")
    table.add_column("stage")
    for heading in ("rows", "stage s", "all s"):
        table.add_column(heading, justify="right")
    table.add_column("live")
    table.add_column("error", overflow="fold", max_width=60)
    for record in statuses:
        end = None if record.finished else now
        seconds = record.stage_seconds(end)
        version = record.version if record.decision == "promoted" else None
        if live is not None:
            version = live.get(record.target)
        last_line = (record.error or "").strip().rpartition("\n")[2]
        table.add_row(
            Text(record.target),
            Text(record.decision or record.stage, style=DECISION_STYLES.get(record.decision or "", "")),
            _rows(record),
            f"{seconds[record.stage]:.0f}" if record.stage in seconds else "–",
            f"{sum(seconds.values()):.0f}" if seconds else "–",
            Text(version or "–"),
            Text(last_line),
        )
    return table


def watch(
    store: ObjectStore,
    run_id: str,
    live: Callable[[], Mapping[str, str]] | None = None,
    *,
    console: Console | None = None,
    interval_s: float = 2.0,
) -> None:
    """Show the table of a run, read again every `interval_s`, until every target has its decision."""
    with Live(console=console, auto_refresh=False) as screen:
        while True:
            statuses = read_status(store, run_id)
            screen.update(status_table(statuses, live() if live else None, time.time()), refresh=True)
            if all(record.finished for record in statuses):
                return
            time.sleep(interval_s)


@contextmanager
def progress_bars(
    store: ObjectStore, run_id: str, console: Console, interval_s: float = 1.0
) -> Iterator[None]:
    """While the block runs, a bar on a terminal for each target that works off a known number of rows or steps."""
    if not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        ended = threading.Event()
        thread = threading.Thread(target=_follow, args=(store, run_id, bars, ended, interval_s), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


def _follow(
    store: ObjectStore, run_id: str, bars: Progress, ended: threading.Event, interval_s: float
) -> None:
    shown: dict[str, tuple[str, TaskID]] = {}  # by target: the stage whose bar it has
    while not ended.wait(interval_s):
        for record in read_status(store, run_id):
            stage, task = shown.get(record.target, ("", None))
            if task is not None and (record.stage != stage or record.finished):
                bars.remove_task(task)
                del shown[record.target]
                task = None
            if record.rows_total is None or record.finished:
                continue
            if task is None:
                task = bars.add_task(f"{record.target}: {record.stage}", total=record.rows_total)
                shown[record.target] = (record.stage, task)
            bars.update(task, completed=record.rows_done or 0)


_FRESH = {"stage": WAITING, "rows_done": None, "rows_total": None, "error": None, "decision": None}


def _key(run_id: str, target: str) -> str:
    if "/" in run_id or "/" in target:
        raise ValueError(f"status: neither the run {run_id!r} nor the target {target!r} may contain '/'")
    return f"status/{run_id}/{target}.json"


def _is_open(record: TargetStatus) -> bool:
    return bool(record.spans) and record.spans[-1].finished is None


def _ended(record: TargetStatus, at: float) -> TargetStatus:
    if not _is_open(record):
        return record
    last = record.spans[-1].model_copy(update={"finished": at})
    return record.model_copy(update={"spans": (*record.spans[:-1], last)})


def _rows(record: TargetStatus) -> str:
    if record.rows_done is None and record.rows_total is None:
        return "–"
    total = "" if record.rows_total is None else f"/{record.rows_total}"
    return f"{record.rows_done or 0}{total}"
