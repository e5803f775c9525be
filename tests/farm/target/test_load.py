"""What cannot serve as a target is refused alone and by name; a LoRA is merged; a digest follows the files."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from farm.config import Refused
from farm.layers.cache import Rows
from farm.sections import Dtype, TargetSpec
from farm.target import zoo
from farm.target.forward import TargetForward
from farm.target.load import (
    check_family,
    load_embedding_and_head,
    load_member,
    load_model,
    load_target,
    open_target,
    resolve_dtype,
    target_digest,
)
from farm.target.weights import is_plain, read_weights
from tests.farm.decode.family import write_lora
from tests.farm.models import tiny_model


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return zoo.train_tokenizer()


def checkpoint(folder: Path, tokenizer: object, **options: object) -> TargetSpec:
    folder.mkdir(parents=True)
    zoo.save(tiny_model(vocab=1024, **options), tokenizer, folder)  # type: ignore[arg-type]
    return TargetSpec(name=folder.name, model=str(folder), prompts="")


@pytest.mark.parametrize(
    ("dtype", "device", "resolved"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "cuda", "bfloat16"),
        ("bfloat16", "cpu", "bfloat16"),
        ("float32", "cuda", "float32"),
    ],
)
def test_auto_is_the_devices_dtype_and_a_named_dtype_stays(dtype: Dtype, device: str, resolved: str) -> None:
    assert resolve_dtype(dtype, device) == resolved


def test_a_target_opens_on_this_machines_device_in_the_dtype_asked_for(
    tmp_path: Path, tokenizer: object
) -> None:
    spec = checkpoint(tmp_path / "base", tokenizer)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in ("auto", "bfloat16"):
        forward = open_target(spec, dtype).forward
        assert forward.device.type == device
        assert forward.dtype == getattr(torch, resolve_dtype(dtype, device))


def test_a_lora_target_computes_base_plus_delta(tmp_path: Path, tokenizer: object) -> None:
    base = checkpoint(tmp_path / "base", tokenizer)
    model = get_peft_model(tiny_model(vocab=1024), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "lora")
    target = load_target(base.model_copy(update={"name": "l", "lora": str(tmp_path / "lora")}))
    tokens = torch.tensor([[5, 6, 7, 8]])
    got = target.forward.logits(target.forward.forward(tokens, Rows([0]), target.forward.new_cache(1, 8)))
    with torch.no_grad():
        torch.testing.assert_close(got, model(tokens).logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_read_alone_are_the_models(tmp_path: Path, tokenizer: object, tied: bool) -> None:
    spec = checkpoint(tmp_path / "base", tokenizer, tie_word_embeddings=tied)
    model = load_model(spec)
    embedding, head = load_embedding_and_head(spec)
    assert torch.equal(embedding, model.get_input_embeddings().weight)
    assert torch.equal(head, model.get_output_embeddings().weight)


def test_a_lora_on_the_head_is_part_of_the_head(tmp_path: Path, tokenizer: object) -> None:
    base = checkpoint(tmp_path / "base", tokenizer)
    model = get_peft_model(tiny_model(vocab=1024), LoraConfig(r=4, target_modules=["lm_head"]))
    torch.nn.init.normal_(model.base_model.model.lm_head.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "lora")
    _, head = load_embedding_and_head(base.model_copy(update={"lora": str(tmp_path / "lora")}))
    assert not torch.allclose(head, load_embedding_and_head(base)[1])


def test_a_head_that_is_missing_though_nothing_ties_it_is_refused(tmp_path: Path, tokenizer: object) -> None:
    """The shard that held it was not copied: the embedding in its place would say something, and nothing true."""
    spec = checkpoint(tmp_path / "base", tokenizer)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["lm_head.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(Refused, match="base: .*lm_head"):
        load_target(spec)


def test_a_head_beside_a_tied_embedding_is_the_head_where_it_differs(
    tmp_path: Path, tokenizer: object
) -> None:
    spec = checkpoint(tmp_path / "base", tokenizer, tie_word_embeddings=True)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1.0
    save_file(tensors, file, {"format": "pt"})
    assert torch.equal(load_target(spec).forward.head_weight, tensors["lm_head.weight"])
    assert torch.equal(load_embedding_and_head(spec)[1], tensors["lm_head.weight"])
    assert load_member(spec).vocab_size == 1024


def test_weights_that_are_quantized_are_taken_with_their_scales(tmp_path: Path, tokenizer: object) -> None:
    """FP8 as published checkpoints have it, a scale a block; cast as they lie in the file they would be noise."""
    spec, scale = checkpoint(tmp_path / "base", tokenizer), 0.01
    file, config = (tmp_path / "base" / name for name in ("model.safetensors", "config.json"))
    kept, plain = load_file(file), {}
    for name, weight in list(kept.items()):
        plain[name] = weight
        if name.endswith("proj.weight"):
            kept[name] = (weight / scale).to(torch.float8_e4m3fn)
            kept[f"{name}_scale_inv"] = torch.full([-(-size // 128) for size in weight.shape], scale)
            plain[name] = kept[name].float() * scale
    save_file(kept, file, {"format": "pt"})
    quantized = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantized}))
    model, forward = tiny_model(vocab=1024), load_target(spec).forward
    model.load_state_dict(plain)
    tokens = torch.tensor([[5, 6, 7, 8]])
    got = forward.logits(forward.forward(tokens, Rows([0]), forward.new_cache(1, 8)))
    with torch.no_grad():
        torch.testing.assert_close(got, model(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "fields",
    [{"init_lora_weights": "pissa"}, {"init_lora_weights": "loftq"}, {"trainable_token_indices": [3]}],
)
def test_a_lora_that_is_more_than_a_sum_is_left_to_peft(fields: dict[str, object]) -> None:
    assert is_plain({"peft_type": "LORA", "r": 4, "lora_alpha": 4})
    assert not is_plain({"peft_type": "LORA", "r": 4, "lora_alpha": 4, **fields})


def test_a_lora_that_waits_for_its_invocation_is_refused(tmp_path: Path, tokenizer: object) -> None:
    base = checkpoint(tmp_path / "base", tokenizer)
    config = LoraConfig(r=4, target_modules=["q_proj"], alora_invocation_tokens=[1, 2])
    get_peft_model(tiny_model(vocab=1024), config).save_pretrained(tmp_path / "lora")
    with pytest.raises(Refused, match="activated LoRA"):
        load_target(base.model_copy(update={"lora": str(tmp_path / "lora")}))


def test_a_pattern_of_modules_may_name_the_head(tmp_path: Path, tokenizer: object) -> None:
    base = checkpoint(tmp_path / "base", tokenizer)
    model = get_peft_model(
        tiny_model(vocab=1024),
        LoraConfig(r=4, target_modules=r".*\.q_proj|.*lm_head", ensure_weight_tying=False),
    )
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path / "lora")
    spec = base.model_copy(update={"lora": str(tmp_path / "lora")})
    assert not torch.equal(load_embedding_and_head(spec)[1], load_embedding_and_head(base)[1])


def test_a_missing_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="gone.*give a checkpoint's folder"):
        load_target(TargetSpec(name="gone", model=str(tmp_path / "gone"), prompts=""))


def test_corrupt_weights_are_refused_by_name(tmp_path: Path, tokenizer: object) -> None:
    spec = checkpoint(tmp_path / "broken", tokenizer)
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for load in (load_target, load_member):
        with pytest.raises(Refused, match="broken.*cannot be loaded"):
            load(spec)


def test_a_pickled_checkpoint_is_refused(tmp_path: Path, tokenizer: object) -> None:
    spec = checkpoint(tmp_path / "pickled", tokenizer)
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(Refused, match="safetensors"):
        load_target(spec)


def test_another_hidden_size_or_tokenizer_is_no_member_of_the_family(
    tmp_path: Path, tokenizer: object
) -> None:
    base = load_member(checkpoint(tmp_path / "base", tokenizer))
    wide = load_member(checkpoint(tmp_path / "wide", tokenizer, hidden=64))
    with pytest.raises(Refused, match="wide: hidden_size is 64, the base's is 32"):
        check_family(base, wide)
    other = load_member(checkpoint(tmp_path / "other", tokenizer))
    other.tokenizer.add_tokens(["<new>"])
    with pytest.raises(Refused, match="other: its tokenizer differs"):
        check_family(base, other)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("model.embed_tokens.weight", (1000, 32)),
        ("lm_head.weight", (1000, 32)),
        ("model.norm.weight", (31,)),
        ("model.layers.1.mlp.down_proj.weight", (32, 60)),
        ("model.layers.1.self_attn.q_proj.weight", (32, 32)),  # which the LoRA does not fit either
        ("model.layers.1.self_attn.k_proj.weight", None),
        ("model.layers.1.input_layernorm.weight", None),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_a_member_is_refused_for_what_its_weights_would_be(
    tmp_path: Path, tokenizer: object, name: str, size: tuple[int, ...] | None, adapted: bool
) -> None:
    """A name or a size that does not fit the config, and with a LoRA the sum; no weight is kept to tell by."""
    spec = checkpoint(tmp_path / "bad", tokenizer)
    if adapted:
        lora = write_lora(tmp_path / "lora", tiny_model(vocab=1024), rank=2, seed=0)
        spec = spec.model_copy(update={"lora": str(lora)})
    load_member(spec)
    file = tmp_path / "bad" / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    if size is not None:
        tensors[name] = torch.zeros(size)
    save_file(tensors, file, {"format": "pt"})
    reasons = []
    for load in (load_target, load_member):
        with pytest.raises(Refused) as refused:
            load(spec)
        reasons.append(str(refused.value))
    assert reasons[0] == reasons[1]


def test_the_digest_follows_weights_and_template_but_not_the_folders_name(
    tmp_path: Path, tokenizer: object
) -> None:
    one, two = checkpoint(tmp_path / "one", tokenizer), checkpoint(tmp_path / "two", tokenizer)
    other = checkpoint(tmp_path / "other", tokenizer, seed=1)
    assert target_digest(one) == target_digest(two)
    assert target_digest(one) != target_digest(other)
    assert target_digest(one) != target_digest(one.model_copy(update={"chat_template": "{{ messages }}"}))


def sharded(folder: Path, tokenizer: object) -> tuple[TargetSpec, Path]:
    """A checkpoint of shards with an index, beside which an earlier download has left a file that sorts last."""
    spec = checkpoint(folder, tokenizer)
    (folder / "model.safetensors").unlink()
    tiny_model(vocab=1024).save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    name = "lm_head.weight"
    old = {name: load_file(next(file for file in shards if name in load_file(file)))[name] + 1.0}
    save_file(old, folder / "model-00009-of-00009.safetensors", {"format": "pt"})
    return spec, shards[0]


def test_files_that_the_index_does_not_name_are_no_part_of_a_checkpoint(
    tmp_path: Path, tokenizer: object
) -> None:
    spec, _ = sharded(tmp_path / "shards", tokenizer)
    expected = AutoModelForCausalLM.from_pretrained(spec.model).state_dict()
    weights = read_weights(Path(spec.model), None, torch.float32)
    assert weights is not None
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    _, head = load_embedding_and_head(spec)
    assert torch.equal(head, expected["lm_head.weight"])


def digest_of_everything(spec: TargetSpec) -> str:
    """sha256 over every file of the folder that may count, as stores of artifacts have it."""
    suffixes, digest = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt"), hashlib.sha256()
    for folder in (spec.model, spec.lora):
        for file in sorted(Path(folder).iterdir() if folder else ()):
            if file.suffix in suffixes:
                digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


STALE = "model-00009-of-00009.safetensors"


def test_the_digest_is_that_of_all_files_where_none_is_stale(tmp_path: Path, tokenizer: object) -> None:
    """Artifacts are named by it: another digest of the same files would make every store start again."""
    whole, (parts, _) = checkpoint(tmp_path / "whole", tokenizer), sharded(tmp_path / "parts", tokenizer)
    (Path(parts.model) / STALE).unlink()
    lora = write_lora(tmp_path / "lora", tiny_model(vocab=1024), rank=2, seed=0)
    for spec in (whole, parts, whole.model_copy(update={"lora": str(lora)})):
        assert target_digest(spec) == digest_of_everything(spec)


def test_the_digest_follows_the_weights_that_count(tmp_path: Path, tokenizer: object) -> None:
    spec, shard = sharded(tmp_path / "parts", tokenizer)
    lora = write_lora(tmp_path / "lora", tiny_model(vocab=1024), rank=2, seed=0)
    spec = spec.model_copy(update={"lora": str(lora)})
    with_stale = target_digest(spec)
    (Path(spec.model) / STALE).unlink()
    before = target_digest(spec)
    assert with_stale == before
    (lora / "model.safetensors").write_bytes(b"PEFT does not read it")
    assert target_digest(spec) == before
    tensors = load_file(shard)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard, {"format": "pt"})
    after = target_digest(spec)
    assert after != before
    write_lora(tmp_path / "other", tiny_model(vocab=1024), rank=2, seed=1)
    shutil.copy(tmp_path / "other" / "adapter_model.safetensors", lora)
    assert target_digest(spec) not in (before, after)


def test_the_digest_follows_shards_in_a_folder_below(tmp_path: Path, tokenizer: object) -> None:
    spec, shard = sharded(tmp_path / "parts", tokenizer)
    index, below = Path(spec.model) / "model.safetensors.index.json", Path(spec.model) / "below"
    below.mkdir()
    shard.replace(below / shard.name)
    index.write_text(index.read_text().replace(shard.name, f"below/{shard.name}"))
    assert isinstance(load_target(spec).forward, TargetForward)
    before = target_digest(spec)
    (below / shard.name).write_bytes(b"other weights")
    assert target_digest(spec) != before


def test_an_index_that_cannot_be_read_is_refused(tmp_path: Path, tokenizer: object) -> None:
    spec, _ = sharded(tmp_path / "parts", tokenizer)
    (Path(spec.model) / "model.safetensors.index.json").write_text("{}")
    for read in (load_target, load_embedding_and_head, target_digest):
        with pytest.raises(Refused, match=r"index.json cannot be read"):
            read(spec)


def test_a_checkpoint_with_a_lora_in_its_folder_is_refused(tmp_path: Path, tokenizer: object) -> None:
    """`transformers` would add the LoRA to it, the weights' files do not say so."""
    spec = checkpoint(tmp_path / "both", tokenizer)
    lora = write_lora(tmp_path / "lora", tiny_model(vocab=1024), rank=2, seed=0)
    for file in lora.iterdir():
        shutil.copy(file, spec.model)
    for load in (load_target, load_model, load_embedding_and_head):
        with pytest.raises(Refused, match="both: .* holds a LoRA beside the checkpoint"):
            load(spec)


def test_a_lora_as_a_pickle_is_refused(tmp_path: Path, tokenizer: object) -> None:
    spec = checkpoint(tmp_path / "base", tokenizer)
    lora = write_lora(tmp_path / "lora", tiny_model(vocab=1024), rank=2, seed=0)
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    for load in (load_target, load_model):
        with pytest.raises(Refused, match=r"base: .*lora has no adapter_model.safetensors"):
            load(spec.model_copy(update={"lora": str(lora)}))


def test_a_whole_file_stands_before_shards(tmp_path: Path, tokenizer: object) -> None:
    spec, _ = sharded(tmp_path / "both", tokenizer)
    tiny_model(vocab=1024, seed=1).save_pretrained(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "model.safetensors", spec.model)
    expected = AutoModelForCausalLM.from_pretrained(spec.model).state_dict()
    weights = read_weights(Path(spec.model), None, torch.float32)
    assert weights is not None
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_shard_that_is_missing_is_refused_by_its_name(tmp_path: Path, tokenizer: object) -> None:
    spec, shard = sharded(tmp_path / "short", tokenizer)
    shard.unlink()
    for load in (load_target, load_member, load_embedding_and_head):
        with pytest.raises(Refused, match=f"short.*{shard.name}"):
            load(spec)
