"""What a training worker tells the outside; runs themselves are in test_packs.py and test_onboard.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farm.fleet.stage_keys import ADAPT
from farm.fleet.trainers import Attempts, TrainJob, steps_shown
from farm.resources import AdaptResources
from farm.status import StatusBoard, read_status
from farm.store import open_store


def job(store: str = "", **fields: Any) -> TrainJob:
    like: Any = {"stage": ADAPT, "task": None, "trunk": None, "record": {}}
    kept = {"resources": AdaptResources(), "attempts": Attempts(), "store": store}
    return TrainJob(**{"name": "t", "key": "k", **like, **kept, **fields})


def test_a_trunk_goes_on_from_a_checkpoint_of_the_same_answers_alone() -> None:
    """Its key is the same whatever prompts the targets of the day bring."""
    first, other = (job(stage="trunk", record={"answers_key": answers}).run_name for answers in ("a", "b"))
    assert first != other
    assert job(stage="trunk", record={"answers_key": "a"}).run_name == first
    assert job(record={"answers_key": "a"}).run_name == "adapt-t-k"  # the key has them


@pytest.mark.parametrize(
    "error", [OSError("no space"), TimeoutError("changed by others"), ValueError("torn")]
)
def test_steps_that_cannot_be_shown_stop_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("ray.train.get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0))
    store = open_store(tmp_path.as_uri())
    show = steps_shown(job(store.uri, shown_as=("r1", ("t",))))
    assert show is not None
    show(5, 10)
    update = StatusBoard.update

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(StatusBoard, "update", refuse)
    show(10, 10)
    assert read_status(store, "r1")[0].rows_done == 5
    monkeypatch.setattr(StatusBoard, "update", update)
    show(10, 10)
    assert read_status(store, "r1")[0].rows_done == 10
