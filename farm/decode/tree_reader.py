# B rows, W nodes of a level, E nodes read, D their depth, H hidden, C draft vocabulary
"""A draft that reads trees level by level.

A node's entry in the draft's cache comes from predicted hidden states; the next round's pending tokens overwrite all
of them with true ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farm.decode.propose import Pending, run_draft
from farm.decode.sampling import SamplingBatch
from farm.draft.lean import Ends, LeanDraft
from farm.layers.cache import Branches, Rows, SlotCache


@dataclass(frozen=True)
class Level:
    """Nodes that the draft has read: the hidden states it predicts after them, what they see, and their paths."""

    hidden_BWH: Tensor
    seen_BWE: Tensor
    paths_BWD: Tensor  # tokens behind the root, the node's own the last

    def pick(self, index_BW: Tensor) -> Level:
        """Some of the nodes of each row, any number of times."""
        parts = (self.hidden_BWH, self.seen_BWE, self.paths_BWD)
        return Level(*(part.gather(1, index_BW[..., None].expand(-1, -1, part.shape[2])) for part in parts))


class TreeReader:
    """The draft at work on a batch of trees; reads the pending tokens, the last of which are the roots, at once.

    `drafts_B`: the rows that a draft extends. Others are read along, and their trees have a root alone.
    """

    def __init__(self, draft: LeanDraft, head: Ends, pending: Pending, cache: SlotCache) -> None:
        self.head, self._draft, self._cache = head, draft, cache
        predicted_BTH = run_draft(draft, head, pending.tokens_BT, pending.hidden_BTH, pending.rows, cache)
        rows_B = torch.arange(len(pending.count), device=predicted_BTH.device)
        at_B = torch.tensor(pending.count, device=predicted_BTH.device) - 1
        nothing = torch.empty(len(rows_B), 1, 0, dtype=torch.int64, device=predicted_BTH.device)
        self.root_B = pending.tokens_BT[rows_B, at_B]
        self.root = Level(predicted_BTH[rows_B, at_B][:, None], nothing.bool(), nothing)
        self.drafts_B = torch.tensor(pending.limits, device=predicted_BTH.device) > 0
        self.forwards = 1
        starts = [start + count for start, count in zip(pending.rows.starts, pending.count, strict=True)]
        self._rows = Rows(starts, pending.rows.first)

    def read(self, parents: Level, tokens_BW: Tensor) -> Level:
        """Reads a level's tokens, each beside its parent; the levels above it were read before."""
        (num_rows, width), depth = tokens_BW.shape, parents.paths_BWD.shape[2]
        itself_WW = torch.eye(width, dtype=torch.bool, device=tokens_BW.device)
        seen_BWE = torch.cat((parents.seen_BWE, itself_WW.expand(num_rows, -1, -1)), dim=2)
        rows = replace(self._rows, branches=Branches(torch.full_like(tokens_BW, depth), seen_BWE))
        hidden_BWH = run_draft(self._draft, self.head, tokens_BW, parents.hidden_BWH, rows, self._cache)
        self.forwards += 1
        return Level(hidden_BWH, seen_BWE, torch.cat((parents.paths_BWD, tokens_BW[..., None]), dim=2))

    def logits(self, level: Level, batch: SamplingBatch) -> Tensor:
        """[B, W, C] after the nodes of a level, penalised for what their paths say."""
        logits_BWC = self.head.logits(level.hidden_BWH)
        if batch.penalties is None:
            return logits_BWC
        paths = {row: level.paths_BWD[row].tolist() for row in batch.penalties.rows}
        return batch.penalties.apply_to_paths(logits_BWC, paths, self.head.vocabulary_C)
