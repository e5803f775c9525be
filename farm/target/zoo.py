"""The embedded default family: a small base, three full fine-tunes and LoRA targets, trained here from text made here.

A fixed number of steps from fixed seeds, never a fixed time, so that its figures repeat. Everything is written as
ordinary Hugging Face folders and a manifest, so the farm treats the zoo as it would any family.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.nn import functional

from farm.target import grammar

Pairs = Sequence[tuple[str, str]]
Progress = Callable[[str, int, int], None]  # what, step, of how many

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCABULARY, CONTEXT = 1024, 512


@dataclass(frozen=True)
class Recipe:
    """How one model of the zoo is trained: steps of `rows` sequences of `tokens` tokens."""

    steps: int
    lr: float
    rows: int
    tokens: int = 128


BASE = Recipe(steps=420, lr=4e-3, rows=8)
FULL = {"math": Recipe(80, 1e-3, 8), "code": Recipe(65, 5e-4, 8), "clinical": Recipe(80, 1e-3, 8)}
LORA = Recipe(80, 5e-3, 8)


def build_zoo(out: Path, num_lora: int = 1, progress: Progress | None = None) -> Path:
    """Writes the family below `out` and returns its manifest.yaml; models that are already there are kept."""
    out, progress = out.resolve(), progress or _silent
    out.mkdir(parents=True, exist_ok=True)
    prompts = _write_prompts(out / "prompts", num_lora)
    base = out / "base"
    if not (base / "config.json").exists():
        tokenizer = train_tokenizer()
        model = new_model(tokenizer)
        train(
            model,
            tokenizer,
            grammar.pairs(grammar.general, 6000, seed=1),
            BASE,
            lambda s, n: progress("base", s, n),
        )
        save(model, tokenizer, base)
    for name, domain in grammar.FULL.items():
        if not (out / name / "config.json").exists():
            finetune(
                base,
                grammar.pairs(domain, 2000, seed=2),
                FULL[name],
                out / name,
                lambda s, n, w=name: progress(w, s, n),
            )
    for index in range(num_lora):
        folder = out / f"lora{index}"
        if not (folder / "adapter_config.json").exists():
            finetune_lora(base, index, folder, lambda s, n, w=folder.name: progress(w, s, n))
    manifest = out / "manifest.yaml"
    manifest.write_text(yaml.safe_dump(manifest_of(out, prompts), sort_keys=False))
    return manifest


def _silent(what: str, step: int, of: int) -> None:
    pass


def manifest_of(out: Path, prompts: dict[str, Path]) -> dict[str, Any]:
    """The zoo in `out` as a manifest, the store beside it; paths are absolute, so that it can be sent to a cluster."""
    targets = [
        {"name": name, "model": str(out / "base"), "lora": str(out / name), "prompts": str(file)}
        if name.startswith("lora")
        else {"name": name, "model": str(out / name), "prompts": str(file)}
        for name, file in prompts.items()
        if name != "base"
    ]
    return {
        "base": str(out / "base"),
        "store": str(out.parent / "store"),
        "targets": targets,
        "train_trunk": {"prompts": str(prompts["base"]), "epochs": 5, "batch_rows": 8, "lr": 3e-3},
        # Models this small are bound by operators, not by bytes: wide batches cost little more than narrow ones.
        "regenerate": {"batch_rows": 64, "shard_rows": 128},
        "adapt": {
            "tier": "expert-lora",
            "rank": 32,
            "form": "unrolled",
            "unroll": 1,
            "tokens": 90_000,
            "batch_rows": 8,
            "lr": 6e-3,
        },  # fmt: skip
        "evaluate": {"speed_prompts": 2, "max_new_tokens": 48},
        "resources": {"regenerate": {"max_actors": 2}},
    }


def train_tokenizer() -> Any:
    """A byte-level BPE over text of all grammars, as a `transformers` tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    domains = [grammar.general, *grammar.FULL.values(), *(grammar.dialect(seed) for seed in range(4))]
    text = (part for domain in domains for pair in grammar.pairs(domain, 400, seed=0) for part in pair)
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
    )  # fmt: skip


def new_model(tokenizer: Any, num_layers: int = 12, hidden_size: int = 128) -> Any:
    """A deep and thin Llama with random weights: deep so that speculation pays on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden_size // 64),
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    model: Any, tokenizer: Any, pairs: Pairs, recipe: Recipe, progress: Callable[[int, int], None]
) -> float:
    """Trains in place on chat-formatted pairs packed into rows; returns the last loss."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.1)
    model.train()
    loss = torch.tensor(float("nan"))
    for step, tokens_BT in enumerate(_batches(tokenizer, pairs, recipe)):
        logits_BTV = model(tokens_BT).logits[:, :-1]
        loss = functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress(step + 1, recipe.steps)
    model.eval()
    return loss.item()


def finetune(
    base: Path, pairs: Pairs, recipe: Recipe, out: Path, progress: Callable[[int, int], None]
) -> None:
    """A full fine-tune of a checkpoint, written as a checkpoint of its own."""
    model, tokenizer = _open(base)
    train(model, tokenizer, pairs, recipe, progress)
    save(model, tokenizer, out)


def finetune_lora(base: Path, seed: int, out: Path, progress: Callable[[int, int], None]) -> None:
    """A LoRA of the base on the dialect of `seed`, written as a PEFT adapter folder."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = _open(base)
    torch.manual_seed(seed)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    model = get_peft_model(model, config)
    train(model, tokenizer, grammar.pairs(grammar.dialect(seed), 1000, seed=3), LORA, progress)
    model.save_pretrained(out)


def save(model: Any, tokenizer: Any, out: Path) -> None:
    """Weights last: config.json appears when the folder is complete."""
    tokenizer.save_pretrained(out)
    staging = out / "staging"
    model.save_pretrained(staging)
    for file in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        file.replace(out / file.name)
    staging.rmdir()


def _open(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _batches(tokenizer: Any, pairs: Pairs, recipe: Recipe) -> Iterator[Tensor]:
    """`recipe.steps` batches [rows, tokens] of shuffled pairs packed end to end."""
    rng, stream, order = random.Random(0), list[int](), list[int]()
    encoded = [
        tokenizer.encode(f"<|user|>{prompt}<|end|><|assistant|>{answer}<|end|>", add_special_tokens=False)
        for prompt, answer in pairs
    ]
    size = recipe.rows * recipe.tokens
    for _ in range(recipe.steps):
        while len(stream) < size:
            if not order:
                order = rng.sample(range(len(encoded)), len(encoded))
            stream += encoded[order.pop()]
        yield torch.tensor(stream[:size]).view(recipe.rows, recipe.tokens)
        stream = stream[size:]


def _write_prompts(folder: Path, num_lora: int) -> dict[str, Path]:
    """A JSONL of prompts for the base and each target, of other seeds than the training text."""
    folder.mkdir(exist_ok=True)
    domains: dict[str, grammar.Grammar] = {"base": grammar.general, **grammar.FULL}
    domains |= {f"lora{seed}": grammar.dialect(seed) for seed in range(num_lora)}
    files = {}
    for name, domain in domains.items():
        rows = grammar.pairs(domain, 576 if name == "base" else 384, seed=4)
        lines = [
            json.dumps({"id": f"{name}-{i}", "prompt": prompt, "answer": answer})
            for i, (prompt, answer) in enumerate(rows)
        ]
        files[name] = folder / f"{name}.jsonl"
        files[name].write_text("\n".join(lines) + "\n")
    return files
