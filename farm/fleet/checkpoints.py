"""Folders of training runs in the store: each run has its own, and begins where another of its name has come to.

Ray Train takes a folder that is there for its own: it overwrites the list of checkpoints, and deletes old ones.
Two runs over one manifest must not do that to each other, and yet go on from what a killed one has left.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyarrow.fs import FileSelector, FileType
from ray.train import Checkpoint, Result, get_checkpoint

from farm.store import ObjectStore, local_copy

START = "start"  # in a run's folder: the copy of another run's checkpoint
COPY_ATTEMPTS, COPY_PAUSE_S = 3, 0.2  # while the other run replaces what is copied


def folder_name(run_name: str, own: str) -> str:
    """Of the run `own` below `train/`: all that would end alike have the same `run_name`."""
    return f"{run_name}@{own}"


def take_over(store: ObjectStore, run_name: str, own: str) -> str | None:
    """The location of a copy of the last checkpoint of another run of this name; None if there is none.

    The other run may be at work: it is left as it is, and may delete what is copied.
    """
    to = f"train/{folder_name(run_name, own)}/{START}"
    for other in _others(store, run_name, own):
        for attempt in range(COPY_ATTEMPTS):
            time.sleep(attempt * COPY_PAUSE_S)
            if _copied(store, other, to):
                return store.location(to)
    return None


@contextmanager
def resumed(start: str | None) -> Iterator[Path | None]:
    """In a worker: a folder with this run's last checkpoint, else with the one at `start`; None for a new beginning."""
    checkpoint = get_checkpoint()
    with TemporaryDirectory() as folder:
        if checkpoint is not None:
            yield Path(checkpoint.to_directory(folder))
        else:
            yield None if start is None else local_copy(start)


def discard(result: Any) -> None:
    """Delete the folder of a run that has ended: optimizer states of what is finished serve nobody.

    First its list of checkpoints, which is a file of the folder itself: `take_over` trusts in it.
    """
    for found in result.filesystem.get_file_info(FileSelector(result.path)):
        if found.type == FileType.File:
            result.filesystem.delete_file(found.path)
    result.filesystem.delete_dir(result.path)


def _others(store: ObjectStore, run_name: str, own: str) -> list[str]:
    """Folders of other runs of the name, the one that was written last first."""
    changed: dict[str, float] = {}
    # Runs had no folders of their own once, but the one of their name.
    for entry in (*store.entries(f"train/{folder_name(run_name, '')}"), *store.entries(f"train/{run_name}/")):
        _, folder, *below = entry.key.split("/")
        if below and folder != folder_name(run_name, own):
            changed[folder] = max(entry.modified, changed.get(folder, 0.0))
    return sorted(changed, key=lambda folder: changed[folder], reverse=True)


def _copied(store: ObjectStore, folder: str, to: str) -> bool:
    """Whether the last checkpoint on a run's list could be copied as a whole."""
    listed = _listed(store, folder)
    if not listed:
        return False
    try:
        _copy(store, listed[-1], to)
    except FileNotFoundError:  # deleted meanwhile
        return False
    # Ray deletes a checkpoint after it has left the list: what is on it still was whole.
    return listed[-1].path in {one.path for one in _listed(store, folder)}


def _listed(store: ObjectStore, folder: str) -> list[Checkpoint]:
    """The checkpoints on a run's list, the last one at its end; none where there is no list that can be read.

    Raises OSError where the store does not answer: a training that has come far must not begin anew for that.
    """
    try:
        result = Result.from_path(f"{store.uri}/train/{folder}")
    except FileNotFoundError:
        return []
    except OSError:
        raise
    except Exception:  # noqa: BLE001 - Ray has several for a list that is being written, or deleted with its run
        return []
    last: Checkpoint | None = result.checkpoint
    older = [one for one, _ in result.best_checkpoints or () if last is not None and one.path != last.path]
    return [] if last is None else [*older, last]


def _copy(store: ObjectStore, checkpoint: Checkpoint, to: str) -> None:
    for key in store.list(f"{to}/"):
        store.delete(key)
    with checkpoint.as_directory() as folder:
        for path in sorted(Path(folder).iterdir()):
            store.put_file(f"{to}/{path.name}", path)
