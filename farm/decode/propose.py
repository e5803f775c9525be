# B rows, T pending tokens, K drafted tokens, H hidden, C draft vocabulary, V vocabulary
"""Propose: a draft extends each row by a chain of k tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from farm.decode.sampling import DRAFT, SamplingBatch, distribution, draw
from farm.draft.lean import LeanDraft
from farm.draft.model import Draft, DraftHead
from farm.layers.attention import causal_mask
from farm.layers.cache import Rows, SlotCache


@dataclass(frozen=True)
class Pending:
    """Committed tokens that the draft has not seen: x_{t+1} beside the target's h_t, `count[b]` of them real."""

    tokens_BT: Tensor
    hidden_BTH: Tensor
    rows: Rows
    count: tuple[int, ...]


@dataclass(frozen=True)
class DraftProposal:
    """A drafted chain and, when it was sampled, the distributions it was drawn from, over the full vocabulary."""

    tokens_BK: Tensor
    q_BKV: Tensor | None


def run_draft(
    draft: Draft | LeanDraft,
    head: DraftHead,
    tokens_BT: Tensor,
    hidden_BTH: Tensor,
    rows: Rows,
    cache: SlotCache,
) -> Tensor:
    """Predicted hidden states [B, T, H]; the draft's cache is extended at the rows' positions."""
    num_tokens = tokens_BT.shape[1]
    positions_BT = rows.positions(num_tokens, tokens_BT.device)
    mask_B1TS = causal_mask(
        positions_BT, rows.context(num_tokens), draft.config.num_heads // draft.config.num_kv_heads
    )

    def remember(k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return *cache.update(0, rows, k_BTGD, v_BTGD), mask_B1TS

    predicted: Tensor = draft(head.embed(tokens_BT), hidden_BTH, positions_BT, remember)
    return predicted


@torch.inference_mode()
def propose(
    draft: Draft | LeanDraft,
    head: DraftHead,
    pending: Pending,
    cache: SlotCache,
    k: int,
    batch: SamplingBatch,
) -> DraftProposal:
    """A chain of `k` tokens a row.

    Entries that the chain writes into `cache` come from predicted hidden states; the next round's pending tokens
    overwrite them with true ones.
    """
    predicted_BTH = run_draft(draft, head, pending.tokens_BT, pending.hidden_BTH, pending.rows, cache)
    last_B = torch.tensor(pending.count, device=predicted_BTH.device) - 1
    hidden_BH = predicted_BTH[torch.arange(len(pending.count)), last_B]
    starts = [start + count - 1 for start, count in zip(pending.rows.starts, pending.count, strict=True)]
    tokens: list[Tensor] = []
    probabilities: list[Tensor] = []
    for index in range(k):
        if index:
            rows = Rows([start + index for start in starts], pending.rows.first)
            hidden_BH = run_draft(draft, head, tokens[-1][:, None], hidden_BH[:, None], rows, cache)[:, 0]
        logits_BC = head.logits(hidden_BH)
        if batch.greedy:
            tokens.append(head.token_ids(logits_BC.argmax(dim=-1)))
            continue
        q_BC = distribution(logits_BC, batch)
        tokens.append(head.token_ids(draw(q_BC, batch.uniform(index, DRAFT))))
        probabilities.append(_expand(q_BC, head))
    return DraftProposal(
        torch.stack(tokens, dim=1), torch.stack(probabilities, dim=1) if probabilities else None
    )


def _expand(q_BC: Tensor, head: DraftHead) -> Tensor:
    """q over the full vocabulary: 0 for every token outside the draft vocabulary."""
    if head.vocabulary_C is None:
        return q_BC
    full_BV = q_BC.new_zeros(q_BC.shape[0], head.embedding_VH.shape[0])
    return full_BV.index_copy_(1, head.vocabulary_C, q_BC)
