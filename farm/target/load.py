"""Opens a target: a Hugging Face checkpoint, a checkpoint with a LoRA merged into it, or a GGUF file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from farm.checksum import file_sha256
from farm.config import Refused
from farm.data.chat import read_template
from farm.layers.lora import Lora
from farm.sections import Dtype, TargetSpec
from farm.store import local_copy
from farm.target.forward import TargetForward, unsupported_reason
from farm.target.model import TargetModel
from farm.target.pretrained import from_checkpoint, with_adapter
from farm.target.weights import INVOCATION, adapter_files, adapter_names, read_weights, weight_files

ENDS = ("model.embed_tokens.weight", "lm_head.weight")
DESCRIBING_SUFFIXES = (".gguf", ".json", ".jinja", ".model", ".txt")


@dataclass(frozen=True)
class LoadedTarget:
    """A target ready to run, with what is needed to talk to it."""

    name: str
    forward: TargetModel
    tokenizer: Any  # a transformers PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    num_bytes: int  # of weights in memory
    chat_template: str | None  # text of the manifest's template; None: the tokenizer's own
    max_positions: int
    config: Any  # the transformers config
    lora: Lora | None = None  # beside a forward that other targets share; None: whatever it was is merged


def resolve_dtype(dtype: Dtype, device: str) -> str:
    """The dtype that `auto` stands for on a device."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def placement(dtype: Dtype) -> tuple[str, str]:
    """The dtype that is meant in this process, and the device that targets decode on."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return resolve_dtype(dtype, device), device


def open_target(spec: TargetSpec, dtype: Dtype) -> LoadedTarget:
    """The target on this process's device, in the dtype that is meant. Raises Refused as `load_target` does."""
    resolved, device = placement(dtype)
    return load_target(spec, dtype=resolved, device=device)


def load_target(spec: TargetSpec, *, dtype: str = "float32", device: str = "cpu") -> LoadedTarget:
    """Loads weights and tokenizer; a LoRA is merged. Raises Refused, naming the reason, for this target alone.

    On `meta` all is read and checked, and no weight kept where the lean forward computes the architecture.
    """
    with unreadable_is_refused(spec):
        config, forward = _config_and_forward(spec, getattr(torch, dtype), device)
        tokenizer = load_tokenizer(spec.model)
    return LoadedTarget(
        name=spec.name,
        forward=forward,
        tokenizer=tokenizer,
        stop_ids=stop_ids(spec, config, tokenizer),
        num_bytes=forward.num_bytes,
        chat_template=read_template(spec.chat_template),
        max_positions=forward.max_positions,
        config=config,
    )


@contextmanager
def unreadable_is_refused(spec: TargetSpec) -> Iterator[None]:
    """Whatever the libraries raise inside the block, where they cannot read a target's files, is a Refused."""
    try:
        yield
    except Refused:
        raise
    except (ImportError, OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise Refused(
            f"{spec.name}: {spec.model} cannot be loaded ({type(error).__name__}: {error})"
        ) from error


def _config_and_forward(spec: TargetSpec, dtype: torch.dtype, device: str) -> tuple[Any, TargetModel]:
    """The lean forward where it computes the architecture, else the model of `transformers`.

    Weights are read from the files where they say everything, else through the libraries' own models. The model of
    `transformers` is tried out when it is opened: it stays on the CPU for `meta`.
    """
    from transformers import AutoConfig

    folder = local_copy(spec.model)
    if folder.suffix != ".gguf":
        check_folder(spec.name, folder)
        if spec.lora is not None:
            check_adapter(spec.name, local_copy(spec.lora))
            _check_always_on(spec.name, local_copy(spec.lora))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        lora = None if spec.lora is None else local_copy(spec.lora)
        weights = read_weights(folder, lora, dtype, device) if unsupported_reason(config) is None else None
        if weights is not None:
            return config, TargetForward(config, weights, device)
    model = load_model(spec, str(dtype).removeprefix("torch."))
    if unsupported_reason(model.config) is None:
        return model.config, TargetForward.of(model.to(device))
    from farm.target.reference import ReferenceForward

    return model.config, ReferenceForward(model if device == "meta" else model.to(device))


def _check_always_on(name: str, lora: Path) -> None:
    """Raises Refused for an adapter that is off until certain tokens are said: nothing merged can be."""
    if json.loads((lora / "adapter_config.json").read_text()).get(INVOCATION):
        raise Refused(
            f"{name}: {lora} is an activated LoRA ({INVOCATION}); train a plain one, or leave it out"
        )


def load_model(spec: TargetSpec, dtype: str = "float32") -> Any:
    """The `transformers` causal LM of a spec: the reference implementation, LoRA merged, in eval mode.

    Raises Refused, naming the tensors, where the checkpoint or the LoRA lacks some or has some of other sizes.
    """
    path = local_copy(spec.model)
    if path.suffix != ".gguf":
        check_folder(spec.name, path)
    model = from_checkpoint(spec.name, path, getattr(torch, dtype))
    if spec.lora is not None:
        lora = local_copy(spec.lora)
        check_adapter(spec.name, lora)
        model = with_adapter(spec.name, model, lora)
    return model.eval().requires_grad_(False)


def load_embedding_and_head(spec: TargetSpec) -> tuple[Tensor, Tensor]:
    """A target's embedding and head, fp32 [V, H] each: all of it that training a draft needs.

    Read straight from the checkpoint where nothing but these two tensors decides them; else the model is loaded.
    """
    folder = local_copy(spec.model)
    if not folder.is_dir() or not _lora_leaves_ends(spec.lora):
        return _ends(load_model(spec))
    check_folder(spec.name, folder)
    found: dict[str, Tensor] = {}
    try:
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as tensors:
                found |= {name: tensors.get_tensor(name).float() for name in ENDS if name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise Refused(f"{spec.name}: {folder} cannot be read ({error}); copy the checkpoint again") from error
    embedding, head = (found.get(name) for name in ENDS)
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings") is True
    if embedding is None or (head is None and not tied):  # other architectures have other names for them
        return _ends(load_model(spec))
    return embedding, embedding if head is None else head


def _ends(model: Any) -> tuple[Tensor, Tensor]:
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def _lora_leaves_ends(lora: str | None) -> bool:
    if lora is None:
        return True
    config = json.loads((local_copy(lora) / "adapter_config.json").read_text())
    targets = config.get("target_modules") or ["all-linear"]
    if isinstance(targets, str) or config.get(
        "trainable_token_indices"
    ):  # a pattern, or rows of the embedding
        return False
    # `save_embedding_layers` adds the ends to the file, and the config does not say so.
    changed = [*targets, *(config.get("modules_to_save") or ()), *adapter_names(local_copy(lora))]
    return not any("embed" in name or "lm_head" in name or name == "all-linear" for name in changed)


def load_tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    path = local_copy(model)
    if path.suffix == ".gguf":
        return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def stop_ids(spec: TargetSpec, config: Any, tokenizer: Any) -> frozenset[int]:
    """End tokens by generation config, model config and tokenizer together."""
    generation = local_copy(spec.model) / "generation_config.json"
    says = json.loads(generation.read_text()) if generation.is_file() else {}
    found: set[int] = set()
    for value in (says.get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id):
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)


def check_folder(name: str, path: Path) -> None:
    """Raises Refused when a checkpoint's folder is not there, lacks its config or weights, or holds a LoRA as well."""
    _check_has(name, path, "config.json")
    if (path / "adapter_config.json").is_file():
        raise Refused(
            f"{name}: {path} holds a LoRA beside the checkpoint, and which of them is meant it does not say; "
            "move the LoRA to a folder of its own, and name it by `lora`"
        )
    files = weight_files(path)
    if not files:
        raise Refused(f"{name}: {path} has no .safetensors weights; save the model as safetensors")
    for file in files:
        if not file.is_file():
            raise Refused(f"{name}: {file}, which the index names, is not there; copy the checkpoint again")


def check_adapter(name: str, path: Path) -> None:
    """Raises Refused when a LoRA's folder is not there or lacks its config or weights."""
    _check_has(name, path, "adapter_config.json")
    if not adapter_files(path):
        raise Refused(f"{name}: {path} has no adapter_model.safetensors; save the LoRA as safetensors")


def _check_has(name: str, path: Path, config: str) -> None:
    if not path.is_dir():
        raise Refused(f"{name}: {path} is no folder; give a checkpoint's folder")
    if not (path / config).is_file():
        raise Refused(f"{name}: {path} has no {config}; give the folder that `save_pretrained` wrote")


def target_digest(spec: TargetSpec) -> str:
    """sha256 over the files that make the target, its LoRA and its chat template.

    Raises Refused if they are missing, or if what they are cannot be read.
    """
    digest = hashlib.sha256()
    for source, weights_of in ((spec.model, weight_files), (spec.lora, adapter_files)):
        if source is None:
            continue
        path = local_copy(source)
        files = [path] if path.is_file() else _digested(path, weights_of(path))
        if not files:
            raise Refused(f"{spec.name}: {path} does not exist or holds no checkpoint; correct the path")
        for file in files:
            named = file.name if path.is_file() else file.relative_to(path).as_posix()
            digest.update(f"{named} {file_sha256(file)}\n".encode())
    digest.update((read_template(spec.chat_template) or "").encode())
    return digest.hexdigest()


def _digested(folder: Path, weights: Collection[Path]) -> list[Path]:
    """Files that say what a folder's target is, by their paths: of safetensors only those that make it."""
    found = {file for file in folder.glob("*") if file.suffix in DESCRIBING_SUFFIXES}
    return sorted(found | {file for file in weights if file.is_file()})


@dataclass(frozen=True)
class Member:
    """What the members of a family have in common."""

    name: str
    hidden_size: int
    vocab_size: int
    tokenizer: Any  # a transformers PreTrainedTokenizerBase


def load_member(spec: TargetSpec) -> Member:
    """Loads a target as `load_target` does, and keeps none of its weights. Raises Refused likewise.

    They are read one by one; what the lean forward or the files do not say is the model of the libraries as a whole.
    """
    loaded = load_target(spec, device="meta")
    return Member(spec.name, loaded.forward.hidden_size, loaded.forward.vocab_size, loaded.tokenizer)


def check_family(base: Member, target: Member) -> None:
    """A draft of the base can only serve a target with its sizes and its tokenizer. Raises Refused otherwise."""
    for what, ours, theirs in (
        ("hidden_size", base.hidden_size, target.hidden_size),
        ("vocab_size", base.vocab_size, target.vocab_size),
    ):
        if ours != theirs:
            raise Refused(
                f"{target.name}: {what} is {theirs}, the base's is {ours}; it is no fine-tune of this base"
            )
    if base.tokenizer.get_vocab() != target.tokenizer.get_vocab():
        raise Refused(
            f"{target.name}: its tokenizer differs from the base's; a draft cannot be shared between them"
        )
