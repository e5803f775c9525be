# V vocabulary, C draft vocabulary
"""Penalties by their definition: everything said, counted anew for one position of one row. Slow, for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from farm.decode.penalties import Said
from farm.decode.sampling import SamplingParams


def penalise(logits_V: Tensor, params: SamplingParams, said: Said, vocabulary_C: Tensor | None) -> Tensor:
    """One row's logits [V], or [C] of a draft's vocabulary, after `said`; see farm/decode/penalties.py."""
    size = int(max((*said.tokens, *(token for token, _ in params.logit_bias), 0))) + 1
    size = max(size, logits_V.shape[0] if vocabulary_C is None else int(vocabulary_C.max()) + 1)
    device = logits_V.device

    def columns(values: Tensor) -> Tensor:
        return values[: logits_V.shape[0]] if vocabulary_C is None else values[vocabulary_C]

    if params.repetition_penalty != 1.0:
        seen_C = columns(_counts(said.tokens, size, device)) > 0
        factor = torch.where(logits_V > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        logits_V = torch.where(seen_C, logits_V * factor, logits_V)
    if params.frequency_penalty or params.presence_penalty:
        count_C = columns(_counts(said.tokens[said.num_prompt :], size, device))
        logits_V = logits_V - params.frequency_penalty * count_C - params.presence_penalty * (count_C > 0)
    if params.logit_bias:
        bias = torch.zeros(size, device=device)
        for token, value in params.logit_bias:
            bias[token] += value
        logits_V = logits_V + columns(bias)
    return logits_V


def _counts(tokens: Sequence[int], size: int, device: torch.device) -> Tensor:
    ids = torch.tensor(tokens, dtype=torch.int64, device=device)
    return torch.bincount(ids, minlength=size).to(torch.float32)
