"""An exported folder: the same draft in another engine's terms, and none of the traps that engines set."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from farm.config import Refused, UserError
from farm.draft.checkpoint import TRUNK_FILE, adapter_state, load_draft
from farm.export.engines import ServingEngine
from farm.export.folder import (
    CARD_FILE,
    MERGED_FOLDER,
    README_FILE,
    TEMPLATE_FILE,
    TOKEN_MAP_FILE,
    WEIGHTS_FILE,
    export,
)
from farm.export.public import trunk_of_eagle, write_trunk
from farm.sections import TargetSpec
from farm.target.load import load_model
from tests.farm.export.drafts import HIDDEN, VOCAB, Family, make_family, predict_of, proposals
from tests.farm.export.eagle1 import Eagle1
from tests.farm.models import tiny_model

VLLM, SGLANG = ServingEngine.VLLM, ServingEngine.SGLANG
K, PROMPTS = 5, 12
TENSORS = {
    "fc.weight",
    "fc.bias",
    "layers.0.post_attention_layernorm.weight",
    *(f"layers.0.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("family"), vocabulary=tuple(range(3, 90)))


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, 30, (PROMPTS,), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def command(folder: Path) -> list[str]:
    """The words of the serve command in the README."""
    (line,) = (folder / README_FILE).read_text().split("```bash\n")[1].split("\n```")[0].splitlines()
    return shlex.split(line)


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


# The draft itself


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("changed"), changed=True)


@pytest.mark.parametrize(("which", "engine"), [("family", VLLM), ("family", SGLANG), ("changed", VLLM)])
def test_what_an_engine_loads_proposes_the_same_tokens_in_float32(
    which: str, engine: ServingEngine, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    family: Family = request.getfixturevalue(which)
    loaded = Eagle1.load(export(family.task(engine, dtype="float32"), tmp_path / "out"))
    for tokens in prompts():
        ours, logits = proposals(predict_of(family.draft), family.model, tokens, K)
        theirs, their_logits = proposals(loaded, family.model, tokens, K)
        assert torch.equal(ours, theirs)
        assert torch.allclose(logits, their_logits, rtol=1e-4, atol=1e-4 * float(logits.abs().max()))


def test_the_comparison_sees_an_export_that_leaves_the_changes_to_the_trunk_out(
    changed: Family, tmp_path: Path
) -> None:
    save_file(adapter_state(changed.draft.expert, None), tmp_path / "alone.safetensors")
    task = replace(changed.task(dtype="float32"), expert=tmp_path / "alone.safetensors")
    loaded = Eagle1.load(export(task, tmp_path / "out"))
    pairs = [
        (proposals(predict, changed.model, tokens, K)[0] for predict in (predict_of(changed.draft), loaded))
        for tokens in prompts()
    ]
    assert sum(not torch.equal(*pair) for pair in pairs) > PROMPTS / 2


def hidden_first(loaded: Eagle1) -> Callable[..., torch.Tensor]:
    return lambda embedded, hidden: loaded(hidden, embedded)


def another_theta(loaded: Eagle1) -> Callable[..., torch.Tensor]:
    loaded.layers[0].self_attn.theta = 500.0
    return loaded


def without_the_private_expert(loaded: Eagle1) -> Callable[..., torch.Tensor]:
    loaded.layers[0].mlp.down_proj.weight[:, 2 * HIDDEN :] = 0
    return loaded


@pytest.mark.parametrize("wrong", [hidden_first, another_theta, without_the_private_expert])
def test_the_comparison_sees_a_draft_that_is_read_wrongly(
    family: Family, tmp_path: Path, wrong: Callable[[Eagle1], Callable[..., torch.Tensor]]
) -> None:
    loaded = wrong(Eagle1.load(export(family.task(dtype="float32"), tmp_path / "out")))
    pairs = [
        (proposals(predict, family.model, tokens, K)[0] for predict in (predict_of(family.draft), loaded))
        for tokens in prompts()
    ]
    assert sum(not torch.equal(*pair) for pair in pairs) > PROMPTS / 2


def test_in_bfloat16_logits_stay_within_what_rounding_leaves(family: Family, tmp_path: Path) -> None:
    """|logit difference| <= |W_v| |h difference|, the latter at most 2^-6 of |h|.

    bfloat16 rounds to 2^-9 of a value. The unfolded sum is rounded four times (two outputs, two sums), the folded one
    twice, and the folded product adds up in another order: eight roundings bound them. Both run in our own forward, so
    that nothing but the fold differs.
    """
    write_trunk(trunk_of_eagle(export(family.task(dtype="bfloat16"), tmp_path / "out")), tmp_path / "trunk")
    folded = load_draft(tmp_path / "trunk")
    model = load_model(family.target, "bfloat16")
    head_VH = model.get_output_embeddings().weight.float()
    drafts = [copy.deepcopy(draft).to(torch.bfloat16) for draft in (family.draft, folded)]
    differs = False
    for tokens in prompts():
        with torch.inference_mode():
            hidden_TH = model.get_decoder()(tokens[None]).last_hidden_state[0, :-1]
            embedded_TH = model.get_input_embeddings()(tokens[1:])
            one_TH, other_TH = (predict_of(draft)(embedded_TH, hidden_TH).float() for draft in drafts)
            difference_TV = ((one_TH - other_TH) @ head_VH.T).abs()
        differs |= bool(difference_TV.any())
        assert bool((difference_TV <= 2**-6 * one_TH.norm(dim=1)[:, None] * head_VH.norm(dim=1)).all())
    assert differs, "two drafts that are the same to the bit would prove nothing"


# What engines drop, refuse or invent without a word


def test_the_file_holds_the_formats_tensors_and_no_other(family: Family, tmp_path: Path) -> None:
    """vLLM refuses `lm_head` and `norm` and a `model.` prefix, keeps a second embedding; layer 0 has no input norm."""
    tensors = load_file(export(family.task(), tmp_path / "out") / WEIGHTS_FILE)
    assert set(tensors) == TENSORS


def test_the_bias_that_sglang_would_leave_random_is_written_as_zero(family: Family, tmp_path: Path) -> None:
    """vLLM drops it without a word, which is right for zeros alone."""
    for engine in (VLLM, SGLANG):
        bias_H = load_file(export(family.task(engine), tmp_path / engine) / WEIGHTS_FILE)["fc.bias"]
        assert bias_H.shape == (HIDDEN,)
        assert not bool(bias_H.any())


def test_both_engines_load_one_file_and_configs_differ_in_the_architecture_alone(
    family: Family, tmp_path: Path
) -> None:
    folders = [export(family.task(engine), tmp_path / engine) for engine in (VLLM, SGLANG)]
    weights = [(folder / WEIGHTS_FILE).read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert [config.pop("architectures") for config in configs] == [
        ["LlamaForCausalLM"],
        ["LlamaForCausalLMEagle"],
    ]
    assert configs[0] == configs[1]


def test_no_key_is_written_that_an_engine_reads_as_something_else(family: Family, tmp_path: Path) -> None:
    """`bias` is the attention's bias to vLLM; the others make an EAGLE-3 or speculators draft of it."""
    config = json.loads((export(family.task(), tmp_path / "out") / "config.json").read_text())
    forbidden = {
        "bias", "qkv_bias", "draft_vocab_size", "target_hidden_size", "num_aux_hidden_states", "eagle_config",
        "eagle_aux_hidden_state_layer_ids", "norm_before_residual", "norm_before_fc", "fc_norm",
        "speculators_model_type", "speculators_config", "transformer_layer_config", "quantization_config",
    }  # fmt: skip
    assert not forbidden & config.keys()


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_the_draft_of_a_qwen_target_is_a_llama(kind: str, tmp_path: Path) -> None:
    """Neither engine has an EAGLE-1 draft of Qwen's type that is without the attention's bias."""
    family = make_family(tmp_path, kind)
    folder = export(family.task(), tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    Eagle1.load(folder)


def test_old_and_new_transformers_read_the_same_rope_and_sizes(tmp_path: Path) -> None:
    """A head size that is not hidden size / heads, and a theta that is not the default."""
    family = make_family(tmp_path, rope_parameters={"rope_theta": 7e5, "rope_type": "default"})
    folder = export(family.task(dtype="bfloat16"), tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())
    assert written["rope_theta"] == 7e5
    read = AutoConfig.from_pretrained(folder)
    assert read.rope_parameters == {"rope_theta": 7e5, "rope_type": "default"}
    assert (read.dtype, read.head_dim, read.num_key_value_heads) == (torch.bfloat16, 16, 2)
    assert read.rms_norm_eps == family.draft.config.rms_eps
    assert not read.tie_word_embeddings


def test_a_scaled_rope_of_the_target_is_not_the_drafts(tmp_path: Path) -> None:
    scaled = {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
    family = make_family(tmp_path, rope_parameters=scaled)
    read = AutoConfig.from_pretrained(export(family.task(), tmp_path / "out"))
    assert read.rope_parameters == {"rope_theta": 1e4, "rope_type": "default"}


@pytest.mark.parametrize("multiple", [1, 16, 128])
def test_the_width_is_a_multiple_that_tensor_parallelism_divides(
    family: Family, tmp_path: Path, multiple: int
) -> None:
    folder = export(family.task(multiple=multiple), tmp_path / "out")
    width = json.loads((folder / "config.json").read_text())["intermediate_size"]
    assert width % multiple == 0
    assert 0 <= width - (2 * HIDDEN + 21) < multiple
    Eagle1.load(folder)


def test_a_pruned_draft_goes_without_its_map_and_sglang_gets_it_beside(
    family: Family, tmp_path: Path
) -> None:
    theirs, ours = (export(family.task(engine), tmp_path / engine) for engine in (VLLM, SGLANG))
    assert not (theirs / TOKEN_MAP_FILE).exists()
    words = command(ours)
    assert after(words, "--speculative-token-map") == str(ours / TOKEN_MAP_FILE)
    ids = torch.load(after(words, "--speculative-token-map"), weights_only=True)
    assert torch.tensor(ids, dtype=torch.int64).tolist() == list(range(3, 90))


def test_a_draft_over_the_full_vocabulary_has_no_map(tmp_path: Path) -> None:
    folder = export(make_family(tmp_path).task(SGLANG), tmp_path / "out")
    assert not (folder / TOKEN_MAP_FILE).exists()
    assert "--speculative-token-map" not in command(folder)


# How it is served


def test_vllm_is_told_to_serve_the_target_with_the_draft_beside(family: Family, tmp_path: Path) -> None:
    """Serving the draft's folder itself would need a remote name of the target."""
    folder = export(family.task(), tmp_path / "out")
    words = command(folder)
    assert words[:3] == ["vllm", "serve", str(Path(family.target.model).resolve())]
    assert json.loads(after(words, "--speculative-config")) == {
        "method": "eagle",
        "model": str(folder),
        "num_speculative_tokens": 3,
    }
    assert after(words, "--dtype") == "float32"


def test_sglang_drafts_a_chain_and_counts_its_first_token(family: Family, tmp_path: Path) -> None:
    words = command(export(family.task(SGLANG), tmp_path / "out"))
    assert after(words, "--speculative-algorithm") == "EAGLE"
    assert after(words, "--speculative-draft-model-path") == str(tmp_path / "out")
    chain = [
        after(words, f"--speculative-{name}") for name in ("num-steps", "eagle-topk", "num-draft-tokens")
    ]
    assert chain == ["3", "1", "4"]


def test_a_target_with_its_own_template_is_served_with_it(family: Family, tmp_path: Path) -> None:
    """The draft was fitted to answers under that template."""
    target = family.target.model_copy(update={"chat_template": "{{ messages[0].content }}"})
    folder = export(replace(family.task(), target=target), tmp_path / "out")
    assert after(command(folder), "--chat-template") == str(folder / TEMPLATE_FILE)
    assert (folder / TEMPLATE_FILE).read_text() == "{{ messages[0].content }}"


def test_a_lora_target_is_exported_merged(family: Family, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(tiny_model(vocab=VOCAB, hidden=HIDDEN), config).save_pretrained(lora)
    target = family.target.model_copy(update={"lora": str(lora)})
    folder = export(replace(family.task(), target=target), tmp_path / "out")
    assert command(folder)[2] == str(folder / MERGED_FOLDER)
    merged = AutoModelForCausalLM.from_pretrained(folder / MERGED_FOLDER)
    tokens = torch.arange(9)[None]
    with torch.inference_mode():
        wanted, plain = (model(tokens).logits for model in (load_model(target), family.model))
        assert torch.allclose(merged(tokens).logits, wanted, atol=1e-4)
        assert not torch.allclose(wanted, plain, atol=1e-1)


def test_the_card_comes_along_and_its_figures_stand_in_the_readme(family: Family, tmp_path: Path) -> None:
    card = {"version": "v7", "evaluation": {"tau_base_draft": 1.23, "tau_adapted": 4.56}}
    folder = export(family.task(card=card), tmp_path / "out")
    assert json.loads((folder / CARD_FILE).read_text()) == card
    text = (folder / README_FILE).read_text()
    assert "1.23" in text
    assert "4.56" in text


# Refusals


def broken_trunk(family: Family, tmp_path: Path, **extra: torch.Tensor) -> Any:
    from safetensors.torch import save_file

    folder = tmp_path / "broken"
    shutil.copytree(family.trunk_folder, folder)
    save_file({**load_file(folder / TRUNK_FILE), **extra}, folder / TRUNK_FILE)
    return replace(family.task(), trunk_folder=folder)


@pytest.mark.parametrize("name", ["fc.bias", "router.weight", "q_proj.bias", "q_norm.weight"])
def test_what_does_not_fold_is_refused_by_name(family: Family, tmp_path: Path, name: str) -> None:
    """A bias of fc, a router, an attention that is not Llama's: each would be dropped without a word."""
    with pytest.raises(UserError, match=name):
        export(broken_trunk(family, tmp_path, **{name: torch.ones(HIDDEN)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["broken"], "nothing half written stays"


def test_a_target_that_the_engine_cannot_serve_is_refused_with_a_way_out(
    family: Family, tmp_path: Path
) -> None:
    gguf = TargetSpec(name="quantized", model=str(tmp_path / "model.gguf"), prompts="p")
    with pytest.raises(Refused, match=r"quantized: .*GGUF.*farm serve"):
        export(replace(family.task(), target=gguf), tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(family.target.model, other)
    spec = family.target.model_copy(update={"model": str(other)})
    for config, reason in (('{"model_type": "gpt2"}', "EAGLE-1 drafts for gpt2"), ("{", "cannot be read")):
        (other / "config.json").write_text(config)
        with pytest.raises(Refused, match=reason):
            export(replace(family.task(), target=spec), tmp_path / "out")


def test_a_draft_of_another_size_is_refused(family: Family, tmp_path: Path) -> None:
    other = make_family(tmp_path, layers=1)
    config = json.loads((Path(other.target.model) / "config.json").read_text())
    (Path(other.target.model) / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(Refused, match="no draft of this target"):
        export(replace(family.task(), target=other.target), tmp_path / "out")


def test_weights_that_the_dtype_cannot_hold_are_refused(family: Family, tmp_path: Path) -> None:
    weight = load_file(family.trunk_folder / TRUNK_FILE)["fc.weight"].clone()
    weight[0, 0] = 1e5
    task = broken_trunk(family, tmp_path, **{"fc.weight": weight})
    with pytest.raises(UserError, match=r"fc\.weight.*float16.*bfloat16"):
        export(replace(task, dtype="float16"), tmp_path / "out")
    export(replace(task, dtype="bfloat16"), tmp_path / "out")


def test_a_folder_that_holds_something_is_left_alone(family: Family, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another folder"):
        export(family.task(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    assert export(family.task(), tmp_path / "empty") == tmp_path / "empty"
