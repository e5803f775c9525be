"""A target made from a checkpoint, a LoRA or a GGUF file learns its answers, and what was saved opens again."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from farm.config import UserError
from farm.data.prompts import Prompt
from farm.layers.cache import Rows
from farm.sections import TargetSpec
from farm.target import zoo
from farm.target.finetune import FinetuneSettings, finetune
from farm.target.load import LoadedTarget, load_target, load_tokenizer
from farm.target.weights import adapter_names
from tests.farm.models import tiny_model
from tests.farm.target.test_reference import tiny

ROWS = [Prompt(i, f"{i}", ({"role": "user", "content": f"tell {i}"},), "a fox and a hen") for i in range(8)]
SETTINGS = FinetuneSettings(steps=12, lr=1e-2, rows=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> TargetSpec:
    folder: Path = tmp_path_factory.mktemp("base")
    zoo.save(tiny_model(vocab=1024), zoo.train_tokenizer(), folder)
    return TargetSpec(name="base", model=str(folder), prompts="")


@pytest.fixture(scope="module")
def gguf_file(base: TargetSpec, tmp_path_factory: pytest.TempPathFactory) -> TargetSpec:
    """The base's weights as a GGUF file, quantized to 8 bits where GGUF does so."""
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    write_gguf(tiny_model(vocab=1024), zoo.train_tokenizer(), path)
    return TargetSpec(name="base", model=str(path), prompts="")


def write_gguf(model: object, tokenizer: object, path: Path) -> None:
    config, writer = model.config, gguf.GGUFWriter(path, "llama")  # type: ignore[attr-defined]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tokenizer.get_vocab()  # type: ignore[attr-defined]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"<unused{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    model_json = json.loads(tokenizer.backend_tokenizer.to_str())["model"]  # type: ignore[attr-defined]
    writer.add_token_merges([" ".join(pair) for pair in model_json.get("merges") or []])
    writer.add_eos_token_id(tokenizer.eos_token_id)  # type: ignore[attr-defined]
    writer.add_chat_template(tokenizer.chat_template)  # type: ignore[attr-defined]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():  # type: ignore[attr-defined]
        stem, _, suffix = name.rpartition(".")
        data = value.numpy()
        if "norm" in name:
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data)
            continue
        if ".q_proj." in name or ".k_proj." in name:
            data = interleaved(data, config.head_dim)
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", gguf.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """GGUF keeps the two halves of a rotary head interleaved."""
    return weight.reshape(-1, 2, head_dim // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def loss_of_answers(target: LoadedTarget) -> float:
    from farm.data.chat import encode_pair

    ids, num_prompt = encode_pair(target.tokenizer, ROWS[0].messages, ROWS[0].answer or "", None)
    cache = target.forward.new_cache(1, len(ids))
    logits = target.forward.logits(target.forward.forward(torch.tensor([ids[:-1]]), Rows([0]), cache))[0]
    return float(torch.nn.functional.cross_entropy(logits[num_prompt - 1 :], torch.tensor(ids[num_prompt:])))


def unseen(*_: int) -> None:
    """Nobody watches the progress."""


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_finetuned_target_opens_and_has_learned_its_answers(
    base: TargetSpec, tmp_path: Path, rank: int | None, dtype: str
) -> None:
    settings = FinetuneSettings(steps=30, lr=1e-2, rows=4, lora_rank=rank, dtype=dtype)  # type: ignore[arg-type]
    finetune(base, ROWS, settings, tmp_path / "made", unseen)
    made = {"lora": str(tmp_path / "made")} if rank else {"model": str(tmp_path / "made")}
    target = load_target(base.model_copy(update={"name": "made", **made}))
    assert loss_of_answers(target) < 0.5 * loss_of_answers(load_target(base))


def test_a_target_of_a_gguf_file_is_saved_as_a_plain_checkpoint(
    gguf_file: TargetSpec, tmp_path: Path
) -> None:
    finetune(gguf_file, ROWS, SETTINGS, tmp_path / "made", unseen)
    made = load_target(TargetSpec(name="made", model=str(tmp_path / "made"), prompts=""))
    assert loss_of_answers(made) < 0.5 * loss_of_answers(load_target(gguf_file))


def test_a_gguf_file_opens_as_the_model_it_was_written_from(base: TargetSpec, gguf_file: TargetSpec) -> None:
    tokens = torch.tensor([[5, 6, 7, 8]])
    forwards: list[Callable[[], torch.Tensor]] = []
    for spec in (base, gguf_file):
        forward = load_target(spec).forward
        forwards.append(lambda f=forward: f.logits(f.forward(tokens, Rows([0]), f.new_cache(1, 8))))  # type: ignore[misc]
    plain, quantized = (forward() for forward in forwards)
    assert torch.equal(plain.argmax(dim=-1), quantized.argmax(dim=-1))
    torch.testing.assert_close(plain, quantized, atol=0.05 * float(plain.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
@pytest.mark.parametrize("rank", [None, 4])
def test_what_is_trained_are_the_models_own_logits(kind: str, rank: int | None, tmp_path: Path) -> None:
    """Soft-capped by Gemma 2, scaled by Granite: the first step's loss is that of what the model says."""
    zoo.save(
        tiny(kind, vocab_size=1024, max_position_embeddings=256), zoo.train_tokenizer(), tmp_path / "base"
    )
    spec = TargetSpec(name="base", model=str(tmp_path / "base"))
    settings = FinetuneSettings(steps=1, rows=1, lora_rank=rank, dtype="float32")
    loss = finetune(spec, ROWS[:1], settings, tmp_path / "made", unseen)
    assert loss == pytest.approx(loss_of_answers(load_target(spec)), rel=1e-3)


def test_a_row_that_is_cut_before_its_answer_is_left_out(base: TargetSpec, tmp_path: Path) -> None:
    """A step of such rows only has no loss, and would make every weight nan."""
    settings = FinetuneSettings(steps=2, rows=1, max_tokens=64)
    long = Prompt(1, "1", ({"role": "user", "content": "fox " * 200},), "a hen")
    assert math.isfinite(finetune(base, [long, ROWS[0]], settings, tmp_path / "made", unseen))
    with pytest.raises(UserError, match="every prompt takes 64 tokens or more"):
        finetune(base, [long], settings, tmp_path / "none", unseen)


def test_a_base_without_a_chat_template_takes_one_and_the_target_has_it(
    base: TargetSpec, tmp_path: Path
) -> None:
    tokenizer = zoo.train_tokenizer()
    tokenizer.chat_template = None
    zoo.save(tiny_model(vocab=1024), tokenizer, tmp_path / "base")
    spec = TargetSpec(name="base", model=str(tmp_path / "base"))
    with pytest.raises(UserError, match="--chat-template"):
        finetune(spec, ROWS, SETTINGS, tmp_path / "none", unseen)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    given = spec.model_copy(update={"chat_template": template})
    finetune(given, ROWS, FinetuneSettings(steps=1, rows=1), tmp_path / "made", unseen)
    assert load_tokenizer(str(tmp_path / "made")).chat_template == template


def test_a_base_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    zoo.save(tiny_model(vocab=1024), zoo.train_tokenizer(), tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"not safetensors")
    for model, said in ((str(tmp_path / "base"), "cannot be loaded"), ("org/model", "is no folder")):
        with pytest.raises(UserError, match=said):
            finetune(TargetSpec(name="base", model=model), ROWS, SETTINGS, tmp_path / "made", unseen)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("phi3", {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
        ("phi", {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}),
    ],
)
def test_a_lora_is_on_every_product_of_the_layers_whatever_they_are_called(
    kind: str, layers: set[str], tmp_path: Path
) -> None:
    sizes = {"vocab_size": 1024, "max_position_embeddings": 256}
    zoo.save(tiny(kind, **sizes), zoo.train_tokenizer(), tmp_path / "base")
    spec = TargetSpec(name="base", model=str(tmp_path / "base"))
    settings = FinetuneSettings(steps=30, lr=1e-2, rows=4, lora_rank=4, dtype="float32")
    finetune(spec, ROWS, settings, tmp_path / "made", unseen)
    names = adapter_names(tmp_path / "made")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == layers
    target = load_target(spec.model_copy(update={"name": "made", "lora": str(tmp_path / "made")}))
    assert loss_of_answers(target) < 0.9 * loss_of_answers(load_target(spec))


def test_rows_without_answers_are_the_users_mistake(base: TargetSpec, tmp_path: Path) -> None:
    rows = [Prompt(0, "0", ROWS[0].messages, None)]
    with pytest.raises(UserError, match="no row has an answer"):
        finetune(base, rows, SETTINGS, tmp_path / "made", unseen)
