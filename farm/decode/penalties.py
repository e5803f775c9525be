# B rows, T positions, V vocabulary, C draft vocabulary
"""Logit bias and penalties: what a request wants more or less of, given what it has said so far.

They come before temperature. Drafted tokens count as said for the positions after them, so that a position that is
verified sees exactly what plain decoding would have seen there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.decode.sampling import SamplingParams


@dataclass(frozen=True)
class Said:
    """What a request has said: its tokens, the first `num_prompt` of which it was given."""

    tokens: Sequence[int]
    num_prompt: int


@dataclass(frozen=True)
class Penalties:
    """Of a batch: the settings of the rows that have any, by row."""

    rows: dict[int, tuple[SamplingParams, Said]]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], said: Sequence[Said]) -> Penalties | None:
        """None when no row has a bias or a penalty: then logits stay as they are."""
        pairs = enumerate(zip(params, said, strict=True))
        rows = {row: (one, words) for row, (one, words) in pairs if one.penalised}
        return cls(rows) if rows else None

    def apply(
        self,
        logits_BTV: Tensor,
        drafted: Sequence[Sequence[int]],
        first: int = 0,
        vocabulary_C: Tensor | None = None,
    ) -> Tensor:
        """New logits: index t of row b follows the row's own tokens and then `drafted[b][: first + t]`.

        `vocabulary_C` names the columns' tokens where the logits are a draft's.
        """
        after = range(first, first + logits_BTV.shape[1])
        paths = {row: [drafted[row][:num] for num in after] for row in self.rows}
        return self.apply_to_paths(logits_BTV, paths, vocabulary_C)

    def apply_to_paths(
        self,
        logits_BTV: Tensor,
        paths: Mapping[int, Sequence[Sequence[int]]],
        vocabulary_C: Tensor | None = None,
    ) -> Tensor:
        """New logits: index t of row b follows the row's own tokens and then `paths[b][t]`.

        `paths` has an entry for each of `rows`.
        """
        out_BTV = logits_BTV.float().clone()
        for row, (params, said) in self.rows.items():
            for position, path in enumerate(paths[row]):
                after = Said([*said.tokens, *path], said.num_prompt)
                out_BTV[row, position] = penalise(out_BTV[row, position], params, after, vocabulary_C)
        return out_BTV


def penalise(logits_V: Tensor, params: SamplingParams, said: Said, vocabulary_C: Tensor | None) -> Tensor:
    """One row's logits.

    Repetition (CTRL, arXiv 1909.05858): positive logits of tokens in prompt or answer are divided, negative ones
    multiplied. Frequency and presence: subtracted for each time, and once, a token stands in the answer. Bias: added.
    """
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
