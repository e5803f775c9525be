# T tokens, H hidden, V vocabulary, K drafted
"""A tiny target on disk with a trunk and two private experts, and what a draft proposes on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from farm.draft.checkpoint import adapter_state, trunk_files
from farm.draft.config import DraftConfig
from farm.draft.model import Draft, new_draft
from farm.export.engines import ServingEngine
from farm.export.folder import ExportTask
from farm.layers.attention import causal_mask
from farm.sections import TargetSpec
from farm.target import zoo
from tests.farm.models import random_delta, tiny_model

VOCAB, HIDDEN = 256, 32
Predict = Callable[[Tensor, Tensor], Tensor]  # embedded [T, H], hidden [T, H] to predicted [T, H]


@dataclass(frozen=True)
class Family:
    """One target with its draft; the trunk's folder holds an expert that is another one."""

    model: Any
    target: TargetSpec
    draft: Draft
    trunk_folder: Path
    expert: Path

    def task(self, engine: ServingEngine = ServingEngine.VLLM, **changes: Any) -> ExportTask:
        fields = {"card": {"target": "tiny", "version": "v1"}, "k": 3, "multiple": 8} | changes
        return ExportTask(self.target, engine, self.trunk_folder, self.expert, **fields)


def make_family(
    folder: Path,
    kind: str = "llama",
    *,
    vocabulary: tuple[int, ...] | None = None,
    changed: bool = False,
    **options: Any,
) -> Family:
    """Writes target, trunk and adapter; the private expert is narrower than the shared one, and odd.

    `changed`: the adapter changes the trunk too.
    """
    model = tiny_model(kind, vocab=VOCAB, hidden=HIDDEN, **options)
    zoo.save(model, zoo.train_tokenizer(), folder / "model")
    config = DraftConfig.for_base(model.config, private_width=21)
    draft = new_draft(config, seed=1, std=0.3).requires_grad_(False)
    if changed:
        draft.delta = random_delta(config, {"fc": 3, "qkv": 2, "out": 4}, seed=3)
    other = new_draft(config, seed=2, std=0.3)
    chosen = None if vocabulary is None else torch.tensor(vocabulary)
    files = trunk_files(config, draft.trunk.state_dict(), other.expert.state_dict(), chosen)
    trunk_folder = folder / "trunk"
    trunk_folder.mkdir()
    for name, data in files.items():
        (trunk_folder / name).write_bytes(data)
    expert = folder / "adapted.safetensors"
    save_file(adapter_state(draft.expert, draft.delta), expert)
    spec = TargetSpec(name="tiny", model=str(folder / "model"), prompts="prompts.jsonl")
    return Family(model, spec, draft, trunk_folder, expert)


def predict_of(draft: Draft) -> Predict:
    """Our own draft over a whole causal sequence."""

    def predict(embedded_TH: Tensor, hidden_TH: Tensor) -> Tensor:
        c = draft.config
        positions_BT = torch.arange(len(embedded_TH))[None]
        mask = causal_mask(positions_BT, len(embedded_TH), c.num_heads // c.num_kv_heads, embedded_TH.dtype)

        def remember(kv_BTPD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            k_BGTD, v_BGTD = kv_BTPD.transpose(1, 2).chunk(2, dim=1)
            return k_BGTD, v_BGTD, mask

        return draft(embedded_TH[None], hidden_TH[None], positions_BT, remember)[0]

    return predict


def proposals(predict: Predict, model: Any, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """K greedy drafted tokens after `tokens` and the logits [K, V] that they are the best of.

    The draft reads the target's hidden states as far as they go and its own predictions from there.
    """
    with torch.inference_mode():
        hidden_TH = model.get_decoder()(tokens[None]).last_hidden_state[0, :-1]
        embedded_TH = model.get_input_embeddings()(tokens[1:])
        head_VH = model.get_output_embeddings().weight
        drafted, logits = [], []
        for _ in range(k):
            last_1H = predict(embedded_TH, hidden_TH)[-1:]
            logits.append(last_1H[0] @ head_VH.T)
            drafted.append(logits[-1].argmax())
            embedded_TH = torch.cat((embedded_TH, model.get_input_embeddings()(drafted[-1][None])))
            hidden_TH = torch.cat((hidden_TH, last_1H))
    return torch.stack(drafted), torch.stack(logits)
