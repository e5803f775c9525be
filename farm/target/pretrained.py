# B rows, T tokens, V vocabulary
"""A target as a model of `transformers`: nothing in it made up, and an adapter merged so that it computes the same.

Where a checkpoint has no tensor for a weight, `transformers` initialises it at random and warns. Where an adapter's
tensors fit no weight, PEFT leaves them out, and merging changes whatever shares a weight with what is adapted.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farm.config import Refused

SHOWN = 3  # names in a message
TRIAL_TOKENS = 16


def from_checkpoint(name: str, path: Path, dtype: torch.dtype) -> Any:
    """The causal LM of a checkpoint's folder or a GGUF file.

    Raises Refused, naming the tensors, where some are missing or of another size than the config says; whatever
    `transformers` raises where the files cannot be read.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to be told the names
    if path.suffix == ".gguf":
        model, found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)
        model = _plain(model)
    else:
        model, found = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **options)
    if found["missing_keys"]:
        raise Refused(
            f"{name}: {path} has no {_listed(found['missing_keys'])}, in whose place would stand random numbers; "
            "copy the checkpoint again"
        )
    if found["mismatched_keys"]:
        sizes = [
            f"{key} {list(there)} in place of {list(said)}" for key, there, said in found["mismatched_keys"]
        ]
        raise Refused(f"{name}: {path} has {_listed(sizes)}; its config.json belongs to other weights")
    return model


def _plain(model: Any) -> Any:
    """A model read from GGUF without the mark of quantization: its weights are plain, and it can be saved."""
    if hasattr(model, "hf_quantizer"):
        del model.hf_quantizer
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False
    return model


def with_adapter(name: str, model: Any, adapter: Path) -> Any:
    """The model with a PEFT adapter merged into it; the model that is given is used up.

    Raises Refused where the adapter does not fit the model, cannot be merged, or would compute something else merged.
    """
    from peft import PeftModel

    num_tokens = len(model.get_input_embeddings().weight)
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    if not hasattr(adapted, "merge_and_unload"):
        kind = str(adapted.active_peft_config.peft_type).removeprefix("PeftType.")
        raise Refused(f"{name}: {adapter} is {kind}, which is not merged into weights; train a LoRA")
    fit = adapted.load_adapter(str(adapter), adapted.active_adapter)  # again, for what it says
    if fit.missing_keys or fit.unexpected_keys:
        names = _listed([*fit.unexpected_keys, *fit.missing_keys])
        raise Refused(f"{name}: {adapter} does not fit its checkpoint by {names}; correct `model` or `lora`")
    expected_TV = _logits(adapted, num_tokens)
    _unshare(adapted)
    merged = adapted.merge_and_unload()
    _settle_ends(merged)
    _check_merged(name, adapter, expected_TV, _logits(merged, num_tokens))
    return merged


def _unshare(adapted: Any) -> None:
    """Gives every module a weight of its own where the adapter changes one that modules share.

    Merging adds to weights in place: a tied head would change with its embedding, a layer used twice would get two
    deltas.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = list(adapted.modules())
    layers = [module.get_base_layer() for module in modules if isinstance(module, BaseTunerLayer)]
    changed = {id(weight) for layer in layers for weight in layer.parameters(recurse=False)}
    taken = set[int]()
    for module in modules:
        for key, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(weight) in taken:
                setattr(module, key, nn.Parameter(weight.detach().clone(), requires_grad=False))
            elif id(weight) in changed:
                taken.add(id(weight))


def _settle_ends(model: Any) -> None:
    """Ties a head that is the embedding, number by number; has the config say which of the two it is.

    Engines read only one of them where the config says that they are tied.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None:
        return
    same = torch.equal(head.weight, embedding.weight)
    if same:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = same


@torch.no_grad()
def _logits(model: Any, num_tokens: int) -> Tensor:
    """Logits [T, V] of a few random tokens."""
    tokens_T = torch.randint(num_tokens, (TRIAL_TOKENS,), generator=torch.Generator().manual_seed(0))
    found_TV: Tensor = model(input_ids=tokens_T[None].to(model.device), use_cache=False).logits[0]
    return found_TV


def _check_merged(name: str, adapter: Path, expected_TV: Tensor, got_TV: Tensor) -> None:
    from farm.target.reference import TOLERANCE

    error = float((got_TV - expected_TV).float().norm() / expected_TV.float().norm())
    if not error <= TOLERANCE[got_TV.dtype]:
        raise Refused(
            f"{name}: {adapter} computes something else when it is merged into its checkpoint (off by {error:.1%}); "
            "save the model with it merged, or train a plain LoRA"
        )


def _listed(names: Collection[str]) -> str:
    """The first names by the alphabet, and how many more there are."""
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown} and {len(names) - SHOWN} more"
