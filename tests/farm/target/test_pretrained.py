"""A model of `transformers` is what the files say: nothing at random, an adapter merged as PEFT computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from farm.config import Refused
from farm.layers.cache import Rows
from farm.sections import TargetSpec
from farm.target import pretrained, zoo
from farm.target.load import load_embedding_and_head, load_member, load_model, load_target
from tests.farm.models import tiny_model
from tests.farm.target.test_reference import tiny

Q = "model.layers.1.self_attn.q_proj"
NEOX = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return zoo.train_tokenizer()


def saved(folder: Path, model: Any, tokenizer: Any) -> TargetSpec:
    zoo.save(model, tokenizer, folder)
    return TargetSpec(name=folder.name, model=str(folder), prompts="")


def rewrite(file: Path, changed: dict[str, torch.Tensor | None]) -> None:
    """Replaces tensors of a file; None removes one."""
    tensors = load_file(file)
    for name, tensor in changed.items():
        del tensors[name]
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file, {"format": "pt"})


def adapted(folder: Path, model: Any, **options: Any) -> Any:
    """A PEFT model whose every trained weight is random, saved to `folder`; eval mode."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]} | options)
    model, generator = get_peft_model(model, config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("tensor", "named"), [(None, "has no "), (torch.zeros(60, 32), r"\[60, 32\] in place of \[64, 32\]")]
)
def test_a_tensor_that_is_missing_or_of_another_size_is_not_made_up(
    tmp_path: Path, tokenizer: Any, tensor: torch.Tensor | None, named: str
) -> None:
    spec = saved(tmp_path / "neox", tiny("gpt_neox", vocab_size=1024), tokenizer)
    load_target(spec)
    rewrite(tmp_path / "neox" / "model.safetensors", {NEOX: tensor})
    for load in (load_target, load_member, load_model, load_embedding_and_head):
        with pytest.raises(Refused, match="neox: ") as refused:
            load(spec)
        assert refused.match(NEOX)
        assert refused.match(named)


def test_a_message_names_a_few_of_many(tmp_path: Path, tokenizer: Any) -> None:
    spec = saved(tmp_path / "neox", tiny("gpt_neox", vocab_size=1024), tokenizer)
    file = tmp_path / "neox" / "model.safetensors"
    rewrite(file, {name: None for name in load_file(file) if ".layers.1." in name})
    with pytest.raises(Refused, match="layers.1.attention.dense.bias, .* and 9 more, in whose place"):
        load_target(spec)


def test_a_tied_head_is_not_missing(tmp_path: Path, tokenizer: Any) -> None:
    for model in (tiny("gemma", vocab_size=1024), tiny_model(vocab=1024, tie_word_embeddings=True)):
        spec = saved(tmp_path / model.config.model_type, model, tokenizer)
        assert "lm_head.weight" not in load_file(Path(spec.model) / "model.safetensors")
        found = load_model(spec)
        assert torch.equal(found.get_output_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_a_lora_on_a_weight_that_is_missing_is_not_added_to_a_random_one(
    tmp_path: Path, tokenizer: Any, options: dict[str, Any]
) -> None:
    spec = saved(tmp_path / "base", tiny_model(vocab=1024), tokenizer)
    adapted(tmp_path / "lora", tiny_model(vocab=1024), **options)
    rewrite(tmp_path / "base" / "model.safetensors", {f"{Q}.weight": None})
    spec = spec.model_copy(update={"lora": str(tmp_path / "lora")})
    for load in (load_target, load_member, load_model):
        with pytest.raises(Refused, match=f"base: .* has no {Q}.weight"):
            load(spec)


ENDS = ["q_proj", "embed_tokens", "lm_head"]
TIED = {"tie_word_embeddings": True}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("rslora", {"use_rslora": True, "lora_alpha": 3}, {}),
    ("dora", {"use_dora": True}, {}),
    ("patterns", {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"q_proj": 32}}, {}),
    ("fan_in_fan_out", {"fan_in_fan_out": True}, {}),
    ("bias", {"bias": "all"}, {"attention_bias": True}),
    ("lora_bias", {"lora_bias": True}, {"attention_bias": True}),
    ("target_parameters", {"target_modules": [], "target_parameters": ["q_proj.weight"]}, {}),
    ("layer_replication", {"layer_replication": [(0, 2), (1, 2)]}, {}),
    ("saved head", {"modules_to_save": ["lm_head"]}, TIED),
    ("saved embedding", {"modules_to_save": ["embed_tokens"]}, TIED),
    ("saved norm", {"modules_to_save": ["input_layernorm"]}, {}),
    ("tokens", {"trainable_token_indices": [3, 5]}, TIED),
    ("ends apart", {"target_modules": ENDS}, {}),
    ("tied embedding", {"target_modules": ENDS[:2]}, TIED),
    ("tied head", {"target_modules": ["q_proj", "lm_head"]}, TIED),
    ("tied ends", {"target_modules": ENDS}, TIED),
    ("tied ends together", {"target_modules": ENDS[:2], "ensure_weight_tying": True}, TIED),
]


@pytest.mark.parametrize(
    ("options", "sizes"), [case[1:] for case in VARIANTS], ids=[case[0] for case in VARIANTS]
)
def test_a_lora_of_any_kind_computes_merged_what_it_computes_in_peft(
    tmp_path: Path, tokenizer: Any, options: dict[str, Any], sizes: dict[str, Any]
) -> None:
    spec = saved(tmp_path / "base", tiny_model(vocab=1024, **sizes), tokenizer)
    model = adapted(tmp_path / "lora", tiny_model(vocab=1024, **sizes), **options)
    spec = spec.model_copy(update={"lora": str(tmp_path / "lora")})
    tokens_1T = torch.randint(1024, (1, 17), generator=torch.Generator().manual_seed(1))
    tokens_1T[0, 2:4] = torch.tensor([3, 5])
    forward, merged = load_target(spec).forward, load_model(spec)
    got = forward.logits(forward.forward(tokens_1T, Rows([0]), forward.new_cache(1, 17)))
    with torch.no_grad():
        expected = model(tokens_1T).logits
        torch.testing.assert_close(merged(tokens_1T).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    ends = load_embedding_and_head(spec)
    for end, own in zip(ends, (forward.embedding, forward.head_weight), strict=True):
        torch.testing.assert_close(end, own)
    assert merged.config.tie_word_embeddings == torch.equal(*ends)


def test_an_embedding_that_an_adapter_holds_beside_its_factors_is_the_targets(
    tmp_path: Path, tokenizer: Any
) -> None:
    spec = saved(tmp_path / "base", tiny_model(vocab=1024), tokenizer)
    model = tiny_model(vocab=1024)
    adapted(tmp_path / "lora", model)
    trained_VH = model.get_input_embeddings().weight + 1.0
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.embed_tokens.weight": trained_VH}, file)
    spec = spec.model_copy(update={"lora": str(tmp_path / "lora")})
    assert torch.equal(load_embedding_and_head(spec)[0], trained_VH)
    assert torch.equal(load_target(spec).forward.embedding, trained_VH)


def test_an_adapter_whose_tensors_fit_no_weight_is_not_silently_the_base(
    tmp_path: Path, tokenizer: Any
) -> None:
    spec = saved(tmp_path / "base", tiny_model(vocab=1024), tokenizer)
    adapted(tmp_path / "lora", tiny_model(vocab=1024))
    file = tmp_path / "lora" / "adapter_model.safetensors"
    renamed = {name.replace("model.layers", "model.text.layers"): x for name, x in load_file(file).items()}
    save_file(renamed, file)
    spec = spec.model_copy(update={"lora": str(tmp_path / "lora")})
    for load in (load_target, load_member, load_model):
        with pytest.raises(Refused, match=r"base: .*lora does not fit its checkpoint by .*q_proj.* more"):
            load(spec)


def test_an_adapter_that_is_not_in_the_weights_is_refused_by_its_kind(tmp_path: Path, tokenizer: Any) -> None:
    spec = saved(tmp_path / "base", tiny_model(vocab=1024), tokenizer)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(tiny_model(vocab=1024), config).save_pretrained(tmp_path / "prompt")
    assert (
        json.loads((tmp_path / "prompt" / "adapter_config.json").read_text())["peft_type"] == "PROMPT_TUNING"
    )
    with pytest.raises(Refused, match="base: .*prompt is PROMPT_TUNING, which is not merged"):
        load_target(spec.model_copy(update={"lora": str(tmp_path / "prompt")}))


def test_a_merge_that_computes_something_else_is_found_out(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for whatever PEFT merges otherwise than it runs: here, a head that changes with its embedding."""
    spec = saved(tmp_path / "base", tiny_model(vocab=1024, **TIED), tokenizer)
    adapted(tmp_path / "lora", tiny_model(vocab=1024, **TIED), target_modules=["embed_tokens"])
    monkeypatch.setattr(pretrained, "_unshare", lambda model: None)
    with pytest.raises(Refused, match=r"base: .*lora computes something else when it is merged .*off by"):
        load_model(spec.model_copy(update={"lora": str(tmp_path / "lora")}))
