"""Trunk and expert on disk: strict by name, shared pages kept, a changed byte seen."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from farm.config import UserError
from farm.draft.checkpoint import (
    EXPERT_FILE,
    TRUNK_FILE,
    adapter_state,
    build_trunk,
    load_adapter,
    load_draft,
    load_expert,
    read_tensors,
    trunk_digest,
    trunk_files,
)
from farm.draft.config import DraftConfig
from farm.draft.model import Draft, new_draft
from tests.farm.models import random_delta

CONFIG = DraftConfig(16, 2, 1, 8, 24, 12, 1e-5, 1e4, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draft = new_draft(CONFIG, seed=0)
    files = trunk_files(CONFIG, draft.trunk.state_dict(), draft.expert.state_dict(), torch.tensor([3, 1, 4]))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_draft_comes_back_as_it_was_saved(folder: Path) -> None:
    draft = new_draft(CONFIG, seed=0)
    again = load_draft(folder)
    for name, value in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert again.trunk.vocabulary_C is not None
    assert again.trunk.vocabulary_C.tolist() == [3, 1, 4]


def test_a_built_trunk_uses_the_very_memory_it_was_given_and_is_frozen(folder: Path) -> None:
    state = read_tensors(folder / TRUNK_FILE)
    trunk = build_trunk(CONFIG, state)
    assert trunk.fc.weight.data_ptr() == state["fc.weight"].data_ptr()
    assert not any(parameter.requires_grad for parameter in trunk.parameters())


def test_a_missing_or_foreign_tensor_is_refused_by_name(folder: Path) -> None:
    state = read_tensors(folder / TRUNK_FILE)
    without = {name: value for name, value in state.items() if name != "fc.weight"}
    with pytest.raises(UserError, match=r"fc\.weight"):
        build_trunk(CONFIG, without)
    with pytest.raises(UserError, match="stranger"):
        build_trunk(CONFIG, {**state, "stranger": torch.zeros(1)})


def test_an_expert_of_another_hidden_size_is_refused(folder: Path) -> None:
    other = DraftConfig(8, 1, 1, 8, 24, 12, 1e-5, 1e4, 32)
    with pytest.raises(UserError, match="size mismatch"):
        load_expert(other, folder / EXPERT_FILE)


def adapted(folder: Path, **extra: torch.Tensor) -> tuple[Draft, Path]:
    """A draft that changes fc and q/k/v, and its adapter's file."""
    base = new_draft(CONFIG, seed=0)
    draft = Draft(base.trunk, base.expert, random_delta(CONFIG, {"fc": 3, "qkv": 2}, seed=1))
    save_file(adapter_state(draft.expert, draft.delta) | extra, folder / "adapter.safetensors")
    return draft, folder / "adapter.safetensors"


def test_changes_to_the_trunk_come_back_as_they_were_saved(folder: Path) -> None:
    draft, path = adapted(folder)
    again = load_draft(folder, path)
    for name, value in draft.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert load_adapter(CONFIG, folder / EXPERT_FILE)[1] is None  # as every adapter was before there were any


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("fc.a_RX", torch.zeros(3, 31), "size mismatch"),
        ("qkv.b_YR", torch.zeros(32, 3), "size mismatch"),
        ("stranger.a_RX", torch.zeros(2, 2), "stranger"),
        ("out.a_RX", torch.zeros(2, 16), "out.b_YR"),
    ],
)
def test_changes_that_do_not_fit_are_refused_by_name(
    folder: Path, name: str, value: torch.Tensor, said: str
) -> None:
    _, path = adapted(folder, **{f"trunk_delta.{name}": value})
    with pytest.raises(UserError, match=said):
        load_adapter(CONFIG, path)


def test_a_truncated_file_is_one_clear_error(folder: Path) -> None:
    path = folder / EXPERT_FILE
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not readable as safetensors"):
        load_expert(CONFIG, path)


def test_one_changed_element_changes_the_digest(folder: Path) -> None:
    state = read_tensors(folder / TRUNK_FILE)
    before = trunk_digest(state)
    state["fc.weight"][0, 0] += 1e-3
    assert trunk_digest(state) != before
