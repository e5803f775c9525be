"""A public EAGLE-1 checkpoint as a trunk: it drafts what it drafted, and its private expert can learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from farm.config import UserError
from farm.draft.checkpoint import load_draft
from farm.export.folder import export
from farm.export.public import trunk_of_eagle, write_trunk
from tests.farm.export.drafts import HIDDEN, VOCAB, Family, make_family, predict_of, proposals
from tests.farm.export.eagle1 import Eagle1


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def checkpoint(family: Family, tmp_path: Path) -> Path:
    return export(family.task(dtype="float32"), tmp_path / "public")


def change(folder: Path, **config: Any) -> None:
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**written, **config}))


def add(folder: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(folder / "model.safetensors"), **tensors}, folder / "model.safetensors")


def test_an_imported_draft_proposes_what_the_checkpoint_does(
    family: Family, checkpoint: Path, tmp_path: Path
) -> None:
    add(checkpoint, **{"embed_tokens.weight": torch.zeros(VOCAB, HIDDEN)})  # public ones carry the base's
    write_trunk(trunk_of_eagle(checkpoint, private_width=12), tmp_path / "trunk")
    draft = load_draft(tmp_path / "trunk")
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["embed_tokens.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    public = Eagle1.load(checkpoint)
    for start in range(0, 60, 5):
        tokens = torch.arange(start, start + 9)
        theirs, logits = proposals(public, family.model, tokens, 4)
        ours, our_logits = proposals(predict_of(draft), family.model, tokens, 4)
        assert torch.equal(ours, theirs)
        assert torch.allclose(our_logits, logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def test_shards_that_the_index_does_not_name_are_no_part_of_a_draft(checkpoint: Path) -> None:
    wanted = trunk_of_eagle(checkpoint)
    file, shard = (checkpoint / name for name in ("model.safetensors", "model-00001-of-00001.safetensors"))
    tensors = load_file(file)
    file.rename(shard)
    save_file({"fc.weight": tensors["fc.weight"] + 1}, checkpoint / "model-00009-of-00009.safetensors")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    assert trunk_of_eagle(checkpoint) == wanted
    index.write_text("{}")
    with pytest.raises(UserError, match=r"index\.json cannot be read .*; copy the checkpoint again"):
        trunk_of_eagle(checkpoint)


def test_the_private_expert_is_silent_and_learns(checkpoint: Path, tmp_path: Path) -> None:
    """Zeros in all three matrices would be silent too, and stay it for ever."""
    write_trunk(trunk_of_eagle(checkpoint, private_width=12), tmp_path / "trunk")
    expert = load_draft(tmp_path / "trunk").expert
    x, wanted = torch.randn(2, 5, HIDDEN)
    assert not bool(expert(x).any())
    optimizer = torch.optim.SGD(expert.parameters(), lr=0.1)
    for _ in range(2):  # the first step moves the last matrix alone
        optimizer.zero_grad()
        (expert(x) - wanted).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None and bool(p.grad.any()) for p in expert.parameters())


def test_an_older_pickle_and_older_rope_keys_are_read(tmp_path: Path) -> None:
    family = make_family(tmp_path, head_dim=HIDDEN // 4)  # which older ones do not say
    checkpoint = export(family.task(dtype="float32"), tmp_path / "public")
    wanted = trunk_of_eagle(checkpoint)
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    written = json.loads((checkpoint / "config.json").read_text())
    del written["rope_parameters"], written["head_dim"]
    written["rope_scaling"] = None
    (checkpoint / "config.json").write_text(json.dumps(written))
    assert trunk_of_eagle(checkpoint) == wanted
    (checkpoint / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read"):
        trunk_of_eagle(checkpoint)


@pytest.mark.parametrize("name", ["fc.bias", "layers.0.self_attn.q_proj.bias"])
def test_a_bias_that_is_not_zero_is_refused(checkpoint: Path, name: str) -> None:
    add(checkpoint, **{name: torch.full((HIDDEN,), 1e-3)})
    with pytest.raises(UserError, match=f"{name} is not 0"):
        trunk_of_eagle(checkpoint)
    add(checkpoint, **{name: torch.zeros(HIDDEN)})
    trunk_of_eagle(checkpoint)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "EAGLE-3"),
        ({"draft_vocab_size": 32000}, "EAGLE-3"),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 13, 24]}}, "EAGLE-3"),
        ({"speculators_model_type": "eagle3"}, "speculators"),
        ({"model_type": "qwen3"}, "model_type"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "RoPE is scaled"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "RoPE is scaled"),
    ],
)
def test_what_is_no_plain_eagle_1_draft_is_refused(
    checkpoint: Path, config: dict[str, Any], reason: str
) -> None:
    change(checkpoint, **config)
    with pytest.raises(UserError, match=reason):
        trunk_of_eagle(checkpoint)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "norm.weight", "d2t", "layers.0.input_layernorm.weight", "hidden_norm.weight"]
)
def test_a_tensor_that_the_trunk_has_no_place_for_is_refused(checkpoint: Path, name: str) -> None:
    """Dropping it would make another draft of it."""
    add(checkpoint, **{name: torch.ones(HIDDEN)})
    with pytest.raises(UserError, match=f"not of the format: {name}"):
        trunk_of_eagle(checkpoint)


def test_a_missing_tensor_or_config_is_named(checkpoint: Path, tmp_path: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=r"missing: fc\.weight"):
        trunk_of_eagle(checkpoint)
    with pytest.raises(UserError, match=r"config\.json: is no config"):
        trunk_of_eagle(tmp_path)
