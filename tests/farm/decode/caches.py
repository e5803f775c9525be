"""What caches should hold, from one forward over a whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from farm.decode.engine import Engine
from farm.decode.propose import run_draft
from farm.layers.cache import Rows, SlotCache
from farm.target.forward import TargetForward


def fresh_caches(
    engine: Engine, target: TargetForward, tokens: list[int], read: int
) -> tuple[Tensor, Tensor]:
    """Entries of the target and of the draft for a sequence, from one prefill and true hidden states."""
    drafting = engine.runner.drafting
    assert drafting is not None
    known, fresh = torch.tensor([tokens[:-1]]), target.new_cache(1, len(tokens))
    hidden = target.forward(known, Rows([0]), fresh)
    shape = drafting._cache.buffer.shape
    mine = SlotCache(1, 1, len(tokens), (shape[2] // 2, shape[4]), target.dtype)
    if read:
        after = torch.tensor([tokens[1 : 1 + read]])
        run_draft(*drafting._drafts.bind(("",)), after, hidden[:, :read], Rows([0]), mine)
    return fresh.buffer[:, 0, :, : len(tokens) - 1], mine.buffer[:, 0, :, :read]
