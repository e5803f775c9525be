# B rows, T positions, V vocabulary, C draft vocabulary, S token ids that are counted, N drafted tokens
"""Logit bias and penalties: what a request wants more or less of, given what it has said so far.

They come before temperature. Drafted tokens count as said for the positions after them, so that a position that is
verified sees exactly what plain decoding would have seen there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from farm.decode.sampling import SamplingParams


class Said:
    """What a request has said: its tokens, the first `num_prompt` of which it was given.

    Counts of them are kept and grow with them, so that a round costs what is new and not the whole context.
    """

    def __init__(self, tokens: Sequence[int], num_prompt: int) -> None:
        """`tokens` may grow at its end afterwards, and change in no other way."""
        self.tokens, self.num_prompt = tokens, num_prompt
        self._num_counted = 0
        self._all_S, self._answer_S = torch.zeros(0), torch.zeros(0)

    @torch.inference_mode(mode=False)  # what is made here is added to inside and outside of that mode
    def count(self, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """How often each token id below some S >= `size` was said, and in the answer: float32 [S] each, read only."""
        first, new = self._num_counted, self.tokens[self._num_counted :]
        missing = max(size, max(new, default=-1) + 1) - len(self._all_S)
        if missing > 0 or self._all_S.device != device:
            both = (self._all_S, self._answer_S)
            self._all_S, self._answer_S = (pad(one.to(device), (0, max(missing, 0))) for one in both)
        if new:
            ids_N = torch.tensor(new, dtype=torch.int64, device=device)
            ones_N = torch.ones(len(new), device=device)
            answered = max(self.num_prompt - first, 0)
            self._all_S.index_add_(0, ids_N, ones_N)
            self._answer_S.index_add_(0, ids_N[answered:], ones_N[answered:])
            self._num_counted += len(new)
        return self._all_S, self._answer_S


@dataclass(frozen=True)
class Penalties:
    """Of a batch: the settings of the rows that have any, by row."""

    rows: dict[int, tuple[SamplingParams, Said]]

    @classmethod
    def of(cls, params: Sequence[SamplingParams], said: Sequence[Said | None]) -> Penalties | None:
        """None when no row has a bias or a penalty: then logits stay as they are. What other rows said is not asked."""
        rows = {}
        for row, (one, words) in enumerate(zip(params, said, strict=True)):
            if one.penalised:
                assert words is not None
                rows[row] = (one, words)
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
            out_BTV[row] = penalise(out_BTV[row], params, said, paths[row], vocabulary_C)
        return out_BTV


def penalise(
    logits_TV: Tensor,
    params: SamplingParams,
    said: Said,
    paths: Sequence[Sequence[int]],
    vocabulary_C: Tensor | None,
) -> Tensor:
    """New logits [T, V] of one row, or [T, C]: position t follows what was said and then `paths[t]`.

    Repetition (CTRL, arXiv 1909.05858): positive logits of tokens in prompt or answer are divided, negative ones
    multiplied. Frequency and presence: subtracted for each time, and once, a token stands in the answer. Bias: added.
    """
    device = logits_TV.device
    width = logits_TV.shape[1] if vocabulary_C is None else int(vocabulary_C.max()) + 1
    named = (*(token for path in paths for token in path), *(token for token, _ in params.logit_bias))
    all_S, answer_S = said.count(max(width, max(named, default=-1) + 1), device)

    def columns(values: Tensor) -> Tensor:
        return values[..., : logits_TV.shape[1]] if vocabulary_C is None else values[..., vocabulary_C]

    if params.repetition_penalty != 1.0:
        seen_TC = columns(_with_paths(all_S, paths)) > 0
        factor_TC = torch.where(logits_TV > 0, 1 / params.repetition_penalty, params.repetition_penalty)
        logits_TV = torch.where(seen_TC, logits_TV * factor_TC, logits_TV)
    if params.frequency_penalty or params.presence_penalty:
        count_TC = columns(_with_paths(answer_S, paths))
        logits_TV = logits_TV - params.frequency_penalty * count_TC - params.presence_penalty * (count_TC > 0)
    if params.logit_bias:
        tokens, values = zip(*params.logit_bias, strict=True)
        bias_S = torch.zeros(len(all_S), device=device)
        values_N = torch.tensor(values, dtype=torch.float32, device=device)
        bias_S.index_add_(0, torch.tensor(tokens, device=device), values_N)
        logits_TV = logits_TV + columns(bias_S)
    return logits_TV


def _with_paths(count_S: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
    """[T, S]: the counts, at each position with its path's tokens added."""
    count_TS = count_S.repeat(len(paths), 1)
    at = [(t, token) for t, path in enumerate(paths) for token in path]
    if at:
        t_N, token_N = torch.tensor(at, device=count_S.device).unbind(dim=1)
        count_TS.index_put_((t_N, token_N), torch.ones(len(at), device=count_S.device), accumulate=True)
    return count_TS
