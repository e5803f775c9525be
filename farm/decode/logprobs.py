# R rows that ask, T positions, V vocabulary, M most alternatives asked for
"""Log-probabilities of committed tokens under the target: those of its logits as they are.

They are raw, as those of OpenAI and vLLM are: before temperature, filters, penalties and bias. A verification has the
target's logits of every position already: they cost one log-softmax of the rows that ask, and nothing where none does.
What was drafted has no part in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.decode.sampling import SamplingParams


@dataclass(frozen=True)
class TokenLogprob:
    """A committed token's log-probability, and (token, log-probability) of the most likely ones, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def rows_that_ask(params: Sequence[SamplingParams]) -> dict[int, int]:
    """How many alternatives each row wants, of the rows that want log-probabilities at all."""
    return {row: one.logprobs for row, one in enumerate(params) if one.logprobs is not None}


def committed_logprobs(
    logits_BTV: Tensor,
    committed: Sequence[Sequence[int]],
    asked: Mapping[int, int],
    nodes_BT: Tensor | None = None,
) -> dict[int, list[TokenLogprob]]:
    """Of the rows `asked`: index t of row b is that of `committed[b][t]` under `logits_BTV[b, t]`.

    Where trees were verified, the logits of that position are those at node `nodes_BT[b, t]` instead.
    """
    rows, longest = list(asked), max(len(committed[row]) for row in asked)
    tokens = [[*committed[row], *[0] * (longest - len(committed[row]))] for row in rows]
    if nodes_BT is None:
        logits_RTV = logits_BTV[rows, :longest]
    else:
        logits_RTV = logits_BTV[torch.tensor(rows)[:, None], nodes_BT[rows, :longest]]
    logp_RTV = logits_RTV.float().log_softmax(dim=-1)
    chosen_RT = logp_RTV.gather(-1, torch.tensor(tokens, device=logp_RTV.device)[..., None]).squeeze(-1)
    most = min(max(asked.values()), logp_RTV.shape[-1])
    best_RTM, order_RTM = logp_RTV.topk(most, dim=-1)
    chosen, best, order = chosen_RT.tolist(), best_RTM.tolist(), order_RTM.tolist()

    def at(r: int, t: int, row: int) -> TokenLogprob:
        top = zip(order[r][t][: asked[row]], best[r][t], strict=False)
        return TokenLogprob(committed[row][t], chosen[r][t], tuple(top))

    return {row: [at(r, t, row) for t in range(len(committed[row]))] for r, row in enumerate(rows)}
