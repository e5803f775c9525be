"""A tiny family on disk: random Llama checkpoints with a tokenizer, a trunk, and adapters in a registry."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from farm.artifacts import Artifacts
from farm.draft.checkpoint import EXPERT_FILE, trunk_files
from farm.draft.config import DraftConfig
from farm.draft.expert import Expert
from farm.draft.model import Draft, new_draft
from farm.registry import Registry
from farm.store import open_store

TRUNK_KEY = "0123456789abcdef"
MAX_POSITIONS = 4096
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LINES = ["the quick brown fox jumps over the lazy dog", "un été à la plage", "one two three 日本語 🙂"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=TEMPLATE
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int, num_layers: int = 2) -> Any:
    """Random weights, large enough that greedy answers vary; they never end by themselves."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0.0  # its logit is 0, below the largest of the others
    return model


def without_context(model: Any) -> Any:
    """The model made such that a token depends on the one before alone: a hidden state is its token's embedding."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def save_checkpoint(folder: Path, seed: int, *, predictable: bool = False) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    model = tiny_model(tokenizer, seed)
    (without_context(model) if predictable else model).save_pretrained(folder)
    return folder


def tiny_expert(seed: int) -> bytes:
    torch.manual_seed(seed)
    return save(Expert(64, 128).state_dict())


def silent_expert() -> bytes:
    """It adds nothing: over a predictable family's trunk, every greedy token is drafted right."""
    expert = Expert(64, 128)
    with torch.no_grad():
        expert.down_proj.weight.zero_()
    return save(expert.state_dict())


def loud_expert(seed: int) -> bytes:
    """Random and large: hardly a token is drafted right."""
    torch.manual_seed(seed)
    expert = Expert(64, 128)
    with torch.no_grad():
        expert.down_proj.weight.mul_(100)
    return save(expert.state_dict())


def copy_embedding(draft: Draft) -> None:
    """The trunk's output becomes the embedding of the last token, and the private expert adds nothing."""
    with torch.no_grad():
        draft.trunk.fc.weight.copy_(torch.cat((torch.eye(64), torch.zeros(64, 64)), dim=1))
        for weight in (draft.trunk.o_proj, draft.trunk.shared_expert.down_proj, draft.expert.down_proj):
            weight.weight.zero_()


def build_family(root: Path, targets: tuple[str, ...], *, predictable: bool = False) -> str:
    """Checkpoints, trunk and family record below `root`; the store's URI. No adapter yet.

    Drafts of a random family are hardly ever right; those of a `predictable` one always are, with a silent expert.
    """
    store = open_store(str(root / "store"))
    artifacts = Artifacts(store)
    folders = {
        name: save_checkpoint(root / name, seed, predictable=predictable) for seed, name in enumerate(targets)
    }
    draft = new_draft(
        DraftConfig.for_base(LlamaForCausalLM.config_class.from_pretrained(root / targets[0])), seed=7
    )
    if predictable:
        copy_embedding(draft)
    files = trunk_files(draft.config, draft.trunk.state_dict(), draft.expert.state_dict(), None)
    for name, data in files.items():
        artifacts.put_file("trunk", TRUNK_KEY, name, data)
    artifacts.finish("trunk", TRUNK_KEY, {})
    rows = {
        name: {"model": str(folder), "lora": None, "revision": None, "chat_template": None}
        for name, folder in folders.items()
    }
    record = {"base": str(root / targets[0]), "trunk_key": TRUNK_KEY, "draft": {}, "targets": rows}
    Registry(store).put_family(record)
    return store.uri


def publish(store: str, target: str, expert: bytes) -> str:
    """Publish an adapter and make it live; returns its version."""
    registry = Registry(open_store(store))
    live = registry.live(target)
    version = registry.publish(target, {EXPERT_FILE: expert}, {"trunk_key": TRUNK_KEY})
    assert registry.promote(target, version.version, live.version if live else None)
    return version.version
