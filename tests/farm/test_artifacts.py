import hashlib
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.artifacts import Artifacts, key_of
from farm.config import UserError
from farm.sections import AdaptSettings
from farm.store import FileStore

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(FileStore(tmp_path))


@given(st.dictionaries(st.text(), JSON))
def test_a_key_does_not_depend_on_the_order_of_fields(config):
    assert key_of("adapt", config, []) == key_of("adapt", dict(reversed(config.items())), [])


def test_a_key_changes_with_stage_setting_and_every_input():
    settings = AdaptSettings()
    keys = [
        key_of("adapt", settings, ["a", "b"]),
        key_of("regenerate", settings, ["a", "b"]),
        key_of("adapt", settings.model_copy(update={"lr": 0.5}), ["a", "b"]),
        key_of("adapt", settings, ["b", "a"]),
        key_of("adapt", settings, ["ab"]),
        key_of("adapt", settings, ["a"]),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of("adapt", settings.model_dump(mode="json"), ["a", "b"]) == keys[0]


def test_an_artifact_exists_only_when_it_is_finished(artifacts):
    artifacts.put_file("regenerate", "k", "tokens-0", b"abc")
    assert artifacts.find("regenerate", "k") is None
    assert artifacts.files("regenerate", "k") == ["tokens-0"]
    finished = artifacts.finish("regenerate", "k", {"rows": 3})
    assert artifacts.find("regenerate", "k") == finished
    assert finished.manifest == {
        "rows": 3,
        "files": {"tokens-0": {"bytes": 3, "sha256": hashlib.sha256(b"abc").hexdigest()}},
    }
    assert artifacts.files("regenerate", "k") == ["tokens-0"]
    assert artifacts.path(finished, "tokens-0").read_bytes() == b"abc"


def test_a_file_is_copied_without_being_held_in_memory(artifacts, tmp_path):
    source, num_bytes = tmp_path / "weights", 64 * 2**20
    with source.open("wb") as file:
        file.truncate(num_bytes)
    tracemalloc.start()
    finished = artifacts.write("adapt", "k", {source.name: source}, {})
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert finished.manifest["files"]["weights"]["bytes"] == num_bytes
    assert most < num_bytes / 8


def test_who_finishes_second_gets_what_the_first_one_finished(artifacts):
    first = artifacts.finish("probe", "k", {"tau": 2.0})
    assert artifacts.finish("probe", "k", {"tau": 3.0}) == first


@pytest.mark.parametrize("action", ["put_file", "write"])
def test_a_second_run_of_a_key_leaves_the_finished_files_as_their_manifest_says(artifacts, action):
    """Two runs of one training end in different weights: the manifest is the first one's."""
    for data in (b"first", b"other"):
        if action == "write":
            finished = artifacts.write("adapt", "k", {"weights": data}, {})
        else:
            artifacts.put_file("adapt", "k", "weights", data)
            finished = artifacts.finish("adapt", "k", {})
    assert artifacts.path(finished, "weights").read_bytes() == b"first"


class Overtaken(FileStore):
    """While one run writes its `at`-th object, another one writes the same artifact to its end."""

    at, calls = 0, 0

    def put(self, key, data):
        self._overtake()
        return super().put(key, data)

    def put_if_absent(self, key, data):
        self._overtake()
        return super().put_if_absent(key, data)

    def _overtake(self):
        self.calls += 1
        if self.calls == self.at:
            Artifacts(FileStore(self.root)).write("trunk", "k", dict.fromkeys("ab", b"other run"), {"by": 2})


@pytest.mark.parametrize("at", [1, 2, 3])
def test_of_two_runs_that_write_one_artifact_at_once_it_is_wholly_the_first_ones(tmp_path, at):
    """A trunk and an expert of two trainings do not fit, nor do files of one and the manifest of the other."""
    store = Overtaken(tmp_path)
    store.at, artifacts = at, Artifacts(store)
    found = artifacts.write("trunk", "k", dict.fromkeys("ab", b"run"), {"by": 1})
    assert found == artifacts.find("trunk", "k")
    assert found.manifest["by"] == 2
    assert [path.read_bytes() for path in sorted(artifacts.folder(found).iterdir())] == [b"other run"] * 2
    assert artifacts.path(found, "a").read_bytes() == b"other run"
    assert len(store.list("artifacts/trunk/k/")) == 3, "the second run's files serve nobody"


def test_a_file_that_is_put_once_is_never_replaced(artifacts):
    assert artifacts.put_once("answers", "k", "card", b"first")
    assert not artifacts.put_once("answers", "k", "card", b"other")
    assert artifacts.path(artifacts.finish("answers", "k", {}), "card").read_bytes() == b"first"
    assert not artifacts.put_once("answers", "k", "late", b"")


def test_artifacts_whose_keys_share_a_beginning_do_not_mix_their_files(artifacts):
    artifacts.put_file("probe", "a", "x", b"")
    artifacts.put_file("probe", "ab", "y", b"")
    assert artifacts.files("probe", "a") == ["x"]


def test_a_file_that_was_cut_after_it_was_finished_is_told_apart_from_a_good_one(artifacts):
    artifacts.put_file("regenerate", "k", "shard", b"abc")
    finished = artifacts.finish("regenerate", "k", {})
    artifacts.path(finished, "shard").write_bytes(b"ab")
    with pytest.raises(UserError, match="has 2 bytes, was written with 3"):
        artifacts.path(finished, "shard")


def test_a_file_that_is_gone_is_told_with_the_remedy_as_a_cut_one_is(artifacts):
    for name in ("gone", "cut"):
        artifacts.put_file("adapt", "k", name, b"abc")
    finished = artifacts.finish("adapt", "k", {})
    folder = artifacts.path(finished, "gone").parent
    (folder / "gone").unlink()
    (folder / "cut").write_bytes(b"ab")
    for name, told in (("gone", "is gone"), ("cut", "has 2 bytes")):
        for read in (artifacts.path, artifacts.location):
            with pytest.raises(UserError, match=rf"{told}.*; delete .*adapt/k, then run again"):
                read(finished, name)


def test_an_output_is_not_finished_without_a_file_that_it_is_to_have(artifacts):
    artifacts.put_file("answers", "k", "tokens", b"x")
    with pytest.raises(UserError, match="features: is gone"):
        artifacts.finish("answers", "k", {}, ["tokens", "features"])
    assert artifacts.find("answers", "k") is None
