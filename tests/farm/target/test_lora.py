"""A LoRA beside its base must be the LoRA merged into it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from farm.layers.cache import Rows
from farm.layers.kernels import kernels
from farm.layers.lora import LoraRows
from farm.target.forward import TargetForward
from farm.target.lora import open_lora
from farm.target.weights import read_factors, read_weights
from tests.farm.decode.family import write_lora
from tests.farm.models import TYPES, tiny_model


@pytest.mark.parametrize("which", [(1, -1, 0, 1), (0, 0, 1, 1), (0, 1, 1, 1), (1, 1, 1, -1)])
@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_three_targets_in_one_forward_equal_three_merged_models(
    kind: str, which: tuple[int, ...], tmp_path: Path
) -> None:
    model = tiny_model(kind).double()
    base = TargetForward.of(model)
    model.save_pretrained(tmp_path / "base")
    adapters = [write_lora(tmp_path / str(seed), model, rank=2 + seed, seed=seed) for seed in range(2)]
    loras = [open_lora(adapter, base) for adapter in adapters]
    tokens = torch.randint(0, 32, (4, 6), generator=torch.Generator().manual_seed(0))
    rows = LoraRows([lora for lora in loras if lora], which, 6, base.device)
    got = base.forward(tokens, Rows([0] * 4), base.new_cache(4, 8), rows)
    for row, index in enumerate(which):
        weights = read_weights(tmp_path / "base", None if index < 0 else adapters[index], torch.float64)
        assert weights is not None
        merged = TargetForward(model.config, weights)
        expected = merged.forward(tokens[row : row + 1], Rows([0]), merged.new_cache(1, 8))
        # Merging is done in float32.
        torch.testing.assert_close(got[row : row + 1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(kernels() is None, reason="operators may round by the shape of a batch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_a_lora_is_the_same_alone_and_beside_one(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit: what a LoRA needs kept apart is rounded where the kernels do not keep it apart, too."""
    model = tiny_model("qwen3", hidden=64).to(dtype)
    base = TargetForward.of(model)
    lora = open_lora(write_lora(tmp_path / "adapter", model, rank=2, seed=0), base)
    assert lora is not None
    tokens = torch.randint(0, 32, (2, 24), generator=torch.Generator().manual_seed(0))
    alone = base.forward(tokens[:1], Rows([0]), base.new_cache(1, 32))
    loras = LoraRows([lora], (-1, 0), 24, base.device)
    beside = base.forward(tokens, Rows([0, 0]), base.new_cache(2, 32), loras)
    assert torch.equal(beside[:1], alone)
    assert not torch.equal(beside[1:], base.forward(tokens[1:], Rows([0]), base.new_cache(1, 32)))


@pytest.mark.parametrize(
    "change", ["head", "embedding", "dora", "rank_pattern", "layer_replication", "unknown"]
)
def test_an_adapter_that_changes_more_than_the_layers_products_is_left_to_be_merged(
    change: str, tmp_path: Path
) -> None:
    model = tiny_model()
    folder = write_lora(tmp_path / "adapter", model, rank=2, seed=0)
    assert open_lora(folder, TargetForward.of(model)) is not None
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if change in ("head", "embedding"):
        name = {"head": "lm_head", "embedding": "model.embed_tokens"}[change]
        extra = {f"base_model.model.{name}.lora_{side}.weight": torch.zeros(2, 32) for side in "AB"}
        save_file(load_file(file) | extra, file)
    else:
        option = {
            "dora": {"use_dora": True}, "rank_pattern": {"rank_pattern": {"q_proj": 4}},
            "layer_replication": {"layer_replication": [[0, 2], [1, 2]]}, "unknown": {"use_what_is_new": True},
        }[change]  # fmt: skip
        config.write_text(json.dumps(json.loads(config.read_text()) | option))
    assert open_lora(folder, TargetForward.of(model)) is None


@pytest.mark.parametrize("options", [{"hidden": 64}, {"head_dim": 32}, {"num_key_value_heads": 1}])
def test_an_adapter_of_another_bases_sizes_is_refused_by_the_tensor(
    options: dict[str, int], tmp_path: Path
) -> None:
    """Its tensors have the names of the base's layers all the same."""
    folder = write_lora(tmp_path / "adapter", tiny_model(**options), rank=2, seed=0)
    base = TargetForward.of(tiny_model())
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.*lora_A \[2, .*do not fit the base's \["):
        open_lora(folder, base)


def test_an_adapter_of_another_rank_than_its_config_says_is_refused(tmp_path: Path) -> None:
    """Its scale is alpha / r: the deltas would have the names and sizes of the right ones, and another length."""
    folder = write_lora(tmp_path / "adapter", tiny_model(), rank=2, seed=0)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 4}))
    with pytest.raises(ValueError, match=r"has rank 2, by .*adapter_config.json it would be 4"):
        open_lora(folder, TargetForward.of(tiny_model()))


def test_an_adapter_without_tensors_is_refused(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "adapter", tiny_model(), rank=2, seed=0)
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no adapted weight"):
        open_lora(folder, TargetForward.of(tiny_model()))


def test_files_beside_an_adapters_are_none_of_it(tmp_path: Path) -> None:
    """PEFT reads one file by its name."""
    model = tiny_model()
    base = TargetForward.of(model)
    folder = write_lora(tmp_path / "adapter", model, rank=2, seed=0)
    expected, other = (read_factors(write_lora(tmp_path / str(i), model, rank=2, seed=i)) for i in (0, 1))
    for name in ("model.safetensors", "zz.safetensors"):
        shutil.copy(tmp_path / "1" / "adapter_model.safetensors", folder / name)
    found = read_factors(folder)
    assert found
    assert expected
    assert other
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name].up_YR, expected[name].up_YR)
    assert not torch.equal(found[name].up_YR, other[name].up_YR)
    assert open_lora(folder, base) is not None


def test_an_adapter_of_another_mlps_width_is_refused(tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "adapter", tiny_model(), rank=2, seed=0)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "mlp" not in name]:
        del tensors[name]
    for name in [name for name in tensors if "gate_proj.lora_B" in name or "up_proj.lora_B" in name]:
        tensors[name] = torch.cat((tensors[name],) * 2)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"gate_proj.*\[128, 2\].*\[64, 32\]"):
        open_lora(folder, TargetForward.of(tiny_model()))
