"""The trunk is mapped, not copied, and a worker that writes to it is caught."""

import os
import sys
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import save_file

from farm.draft.checkpoint import trunk_digest
from farm.fleet.trunk import TrunkChanged, borrow_trunk, close_trunk, ensure_trunk, open_trunk, pack, unpack

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
TRUNK_BYTES = 256 * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_packing_keeps_bits_and_shares_memory(dtype: torch.dtype) -> None:
    tensor = torch.arange(24).reshape(2, 3, 4).to(dtype)
    back = unpack(pack(tensor))
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    assert back.data_ptr() == tensor.data_ptr()


def test_packing_a_scalar_keeps_its_shape() -> None:
    assert unpack(pack(torch.tensor(3.0))).shape == ()


@ray.remote(num_cpus=0)
class Reader:
    """A worker that maps the trunk, reads every page, and may write to it."""

    def __init__(self, revision: str) -> None:
        self.revision = revision
        self.state, _ = open_trunk(revision)

    def private_kib(self) -> tuple[int, int]:
        """(private, resident) KiB of the mapping that holds the first tensor, after every page was read."""
        total = sum(float(tensor.float().sum()) for tensor in self.state.values())
        assert total == total
        return _mapping_kib(self.state["fc.weight"].data_ptr())

    def write_while_borrowed(self) -> str:
        try:
            with borrow_trunk(self.revision) as state:
                state["fc.weight"][0, 0] += 1
        except TrunkChanged as error:
            return str(error)
        return ""


def _mapping_kib(address: int) -> tuple[int, int]:
    private = resident = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= address < last
        elif inside and head in ("Private_Clean:", "Private_Dirty:"):
            private += int(line.split()[1])
        elif inside and head == "Rss:":
            resident += int(line.split()[1])
    return private, resident


@pytest.fixture
def revision(ray_cluster: object, tmp_path: Path) -> object:
    rows = TRUNK_BYTES // 2 // 1024 // 2
    state = {
        "fc.weight": torch.randn(rows, 1024).to(torch.bfloat16),
        "attention.weight": torch.randn(rows, 1024).to(torch.bfloat16),
    }
    path = tmp_path / "trunk.safetensors"
    save_file(state, path)
    name = f"test-{os.getpid()}"
    assert ensure_trunk(name, path) == trunk_digest(state)
    yield name
    close_trunk(name)


@pytest.mark.ray
def test_two_workers_map_the_same_pages_and_a_write_is_caught(revision: str) -> None:
    readers = [Reader.remote(revision) for _ in range(2)]
    for private, resident in ray.get([reader.private_kib.remote() for reader in readers]):
        assert resident >= TRUNK_BYTES // 1024
        assert private < 5 * 1024
    assert "after the work" in ray.get(readers[0].write_while_borrowed.remote())
    # The pages are shared, so the write of one worker reaches the other, whose check refuses to begin.
    assert "before the work" in ray.get(readers[1].write_while_borrowed.remote())


@pytest.mark.ray
def test_a_trunk_that_another_run_puts_away_between_two_looks_is_put_again(
    revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []

    def put_and_closed(name: str, path: Path | str) -> str:
        digest = ensure_trunk(name, path)
        if not closed:
            closed.append(close_trunk(name))
        return digest

    monkeypatch.setattr("farm.fleet.trunk.ensure_trunk", put_and_closed)
    with borrow_trunk(revision, tmp_path / "trunk.safetensors") as state:
        assert closed == [True]
        assert state.keys() == {"fc.weight", "attention.weight"}
