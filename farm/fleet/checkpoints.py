"""Folders of training runs in the store: each run has its own, and begins where another of its name has come to.

Ray Train takes a folder that is there for its own: it overwrites the list of checkpoints, and deletes old ones.
Two runs over one manifest must not do that to each other, and yet go on from what a killed one has left.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pyarrow.fs import FileSelector, FileType
from ray.train import Checkpoint, Result, get_checkpoint

from farm.store import ObjectStore, local_copy

START = "start"  # in a run's folder: the copy of another run's checkpoint
COPY_ATTEMPTS = 3  # while the other run replaces what is copied


def folder_name(run_name: str, own: str) -> str:
    """Of the run `own` below `train/`: all that would end alike have the same `run_name`."""
    return f"{run_name}@{own}"


def take_over(store: ObjectStore, run_name: str, own: str) -> str | None:
    """The location of a copy of the last checkpoint of another run of this name; None if there is none.

    The other run may be at work: it is left as it is, and may delete what is copied.
    """
    for other in _others(store, run_name, own):
        for _ in range(COPY_ATTEMPTS):
            found = _last(store, other)
            if found is None:
                continue
            to = f"train/{folder_name(run_name, own)}/{START}"
            try:
                _copy(store, found, to)
            except FileNotFoundError:  # deleted meanwhile
                continue
            # Ray deletes a checkpoint after it has left the list: what is on it still was whole.
            now = _last(store, other)
            if now is not None and now.path == found.path:
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
    for entry in store.entries(f"train/{folder_name(run_name, '')}"):
        _, folder, *below = entry.key.split("/")
        if below and folder != folder_name(run_name, own):
            changed[folder] = max(entry.modified, changed.get(folder, 0.0))
    return sorted(changed, key=lambda folder: changed[folder], reverse=True)


def _last(store: ObjectStore, folder: str) -> Checkpoint | None:
    """The last checkpoint on a run's list; None if there is none, or no list that can be read."""
    try:
        found: Checkpoint | None = Result.from_path(f"{store.uri}/train/{folder}").checkpoint
    except Exception:  # noqa: BLE001 - Ray has several for a list that is being written, or deleted with its run
        return None
    return found


def _copy(store: ObjectStore, checkpoint: Checkpoint, to: str) -> None:
    for key in store.list(f"{to}/"):
        store.delete(key)
    with checkpoint.as_directory() as folder:
        for path in sorted(Path(folder).iterdir()):
            store.put_file(f"{to}/{path.name}", path)
