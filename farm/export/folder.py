"""An exported draft as a folder: weights, config, the card, how to serve it, and what the engine needs beside them."""

from __future__ import annotations

import io
import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from farm.config import Refused, UserError
from farm.data.chat import read_template
from farm.draft.checkpoint import load_draft
from farm.export.eagle import eagle_config, eagle_tensors, folded_mlp
from farm.export.engines import ARCHITECTURES, ServingEngine, StoredDtype
from farm.sections import TargetSpec
from farm.store import local_copy
from farm.target.load import check_folder, load_model, load_tokenizer

WEIGHTS_FILE, TOKEN_MAP_FILE, TEMPLATE_FILE = "model.safetensors", "token_map.pt", "chat_template.jinja"
CARD_FILE, README_FILE, MERGED_FOLDER = "card.json", "README.md", "target"
# Types whose model in both engines gives a draft its hidden states after the final norm, as ours does.
SERVABLE_TYPES = ("llama", "qwen2", "qwen3")
WIDTH_MULTIPLE = 128  # divisible by every usual tensor parallelism and quantization group


@dataclass(frozen=True)
class ExportTask:
    """What to export; paths are local. `k` is the number of tokens that the serve command drafts."""

    target: TargetSpec
    engine: ServingEngine
    trunk_folder: Path
    expert: Path
    card: Mapping[str, Any]
    k: int
    dtype: StoredDtype | None = None  # None: the one that the target's checkpoint is stored in
    multiple: int = WIDTH_MULTIPLE


def export(task: ExportTask, out: Path) -> Path:
    """Writes the folder and returns it; it appears whole, or not at all.

    A LoRA target's merged checkpoint is written into it too, since an engine has to serve what the draft was fitted to.
    Raises UserError when `out` holds something, and Refused when the draft does not fold or the engine cannot serve
    the target.
    """
    config = check_servable(task.target, task.engine)
    with new_folder(out) as (folder, final):
        _write(task, config, folder, final)
    return final


@contextmanager
def new_folder(out: Path) -> Iterator[tuple[Path, Path]]:
    """A folder to fill, and the absolute path where it will be once the block has ended well.

    Raises UserError when `out` holds something.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already; choose another folder, or remove it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        yield folder, out
        folder.replace(out)  # over an empty folder too


def check_servable(target: TargetSpec, engine: ServingEngine) -> Any:
    """The target's `transformers` config. Raises Refused when the engine could not serve the target with a draft."""
    from transformers import AutoConfig

    path = local_copy(target.model)
    if path.suffix == ".gguf":
        raise Refused(
            f"{target.name}: {path.name} is a GGUF file, beside which {engine} takes no EAGLE draft; save the model "
            "as a safetensors checkpoint, or serve it with `farm serve`"
        )
    check_folder(target.name, path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"{target.name}: {path / 'config.json'} cannot be read ({error})") from error
    if config.model_type not in SERVABLE_TYPES:
        raise Refused(
            f"{target.name}: {engine} is not known to take EAGLE-1 drafts for {config.model_type} models, only for "
            f"{', '.join(SERVABLE_TYPES)}; serve it with `farm serve`"
        )
    return config


def stored_dtype(config: Any) -> StoredDtype:
    """The dtype that a checkpoint says it is stored in; float32 where it says nothing that can be exported."""
    said = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return said if said in ("bfloat16", "float16") else "float32"  # type: ignore[return-value]


def serve_command(task: ExportTask, folder: Path, model: str, dtype: StoredDtype, *, has_map: bool) -> str:
    """The shell command that serves `model` with the draft in `folder`; folders are absolute."""
    template = ["--chat-template", str(folder / TEMPLATE_FILE)] if task.target.chat_template else []
    name = ["--served-model-name", task.target.name]
    if task.engine is ServingEngine.VLLM:
        draft = {"method": "eagle", "model": str(folder), "num_speculative_tokens": task.k}
        words = ["vllm", "serve", model, *name, "--dtype", dtype, "--speculative-config", json.dumps(draft)]
        return shlex.join([*words, *template])
    words = ["python", "-m", "sglang.launch_server", "--model-path", model, *name, "--dtype", dtype]
    words += ["--speculative-algorithm", "EAGLE", "--speculative-draft-model-path", str(folder)]
    # A chain: as many steps as tokens; the engine counts the token that they start from as drafted.
    words += ["--speculative-num-steps", str(task.k), "--speculative-eagle-topk", "1"]
    words += ["--speculative-num-draft-tokens", str(task.k + 1)]
    words += ["--speculative-token-map", str(folder / TOKEN_MAP_FILE)] if has_map else []
    return shlex.join([*words, *template])


def _write(task: ExportTask, config: Any, folder: Path, final: Path) -> None:
    """All files of the export; `final` is where the folder will be."""
    draft = load_draft(task.trunk_folder, task.expert).folded()
    sizes = config.hidden_size, config.vocab_size
    if sizes != (draft.config.hidden_size, draft.config.vocab_size):
        raise Refused(
            f"{task.target.name}: has hidden size and vocabulary {sizes}, the draft "
            f"{(draft.config.hidden_size, draft.config.vocab_size)}; it is no draft of this target"
        )
    trunk, mlp = draft.trunk, folded_mlp(draft, task.multiple)
    dtype = task.dtype or stored_dtype(config)
    tensors = eagle_tensors(trunk, mlp, dtype)
    (folder / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
    described = eagle_config(draft.config, mlp.width, config.max_position_embeddings, dtype, task.engine)
    (folder / "config.json").write_text(json.dumps(described, indent=1) + "\n")
    (folder / CARD_FILE).write_text(json.dumps(dict(task.card), indent=1, sort_keys=True) + "\n")
    has_map = task.engine is ServingEngine.SGLANG and trunk.vocabulary_C is not None
    if has_map and trunk.vocabulary_C is not None:
        (folder / TOKEN_MAP_FILE).write_bytes(token_map(trunk.vocabulary_C))
    if (template := read_template(task.target.chat_template)) is not None:
        (folder / TEMPLATE_FILE).write_text(template)
    model = str(local_copy(task.target.model).resolve())
    if task.target.lora is not None:
        merge(task.target, folder / MERGED_FOLDER)
        model = str(final / MERGED_FOLDER)
    command = serve_command(task, final, model, dtype, has_map=has_map)
    (folder / README_FILE).write_text(_readme(task, command, dtype, mlp.width, has_map=has_map))


def token_map(vocabulary_C: Tensor) -> bytes:
    """The file of SGLang's `--speculative-token-map`: the ids that a draft may propose, a list that torch saved."""
    buffer = io.BytesIO()
    torch.save(vocabulary_C.tolist(), buffer)
    return buffer.getvalue()


def merge(target: TargetSpec, folder: Path) -> None:
    """Writes a LoRA target as a checkpoint of its own, with its tokenizer, in the dtype of the model beneath it."""
    from transformers import AutoConfig

    dtype = stored_dtype(AutoConfig.from_pretrained(local_copy(target.model), trust_remote_code=False))
    load_model(target, dtype).save_pretrained(folder)
    load_tokenizer(target.model).save_pretrained(folder)


def _readme(task: ExportTask, command: str, dtype: StoredDtype, width: int, *, has_map: bool) -> str:
    evaluation = task.card.get("evaluation", {})
    figures = [
        f"- tau of the {what}: {evaluation[field]:.2f}, measured by farm before the export"
        for field, what in (("tau_base_draft", "base draft"), ("tau_adapted", "adapted draft"))
        if evaluation.get(field) is not None
    ]
    pruned = (
        f"It was trained over a part of the vocabulary. `{TOKEN_MAP_FILE}` names that part for "
        "`--speculative-token-map`; without it the engine drafts over the target's full head."
    )
    lines = [
        f"# Draft of {task.target.name} for {task.engine}",
        "",
        f"An EAGLE-1 draft ({ARCHITECTURES[task.engine]}, {dtype}, MLP of width {width}), to be served with:",
        "",
        "```bash",
        command,
        "```",
        "",
        "Embedding and head are the target's. The draft fits this target alone: beside another model it is correct, "
        "since every token is verified, but slow.",
        *(["", pruned] if has_map else []),
        *(["", f"`{MERGED_FOLDER}/` is the target with its LoRA merged."] if task.target.lora else []),
        *(["", *figures] if figures else []),
        "",
        f"`{CARD_FILE}` says what it was made of.",
        "",
    ]
    return "\n".join(lines)
