"""A LoRA beside its base must be the LoRA merged into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from farm.layers.cache import Rows
from farm.layers.lora import LoraRows
from farm.target.forward import TargetForward
from farm.target.lora import open_lora
from farm.target.weights import read_weights
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


@pytest.mark.parametrize("change", ["head", "embedding", "dora", "rank_pattern"])
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
        option = {"dora": {"use_dora": True}, "rank_pattern": {"rank_pattern": {"q_proj": 4}}}[change]
        config.write_text(json.dumps(json.loads(config.read_text()) | option))
    assert open_lora(folder, TargetForward.of(model)) is None
