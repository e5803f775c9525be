# B rows, T tokens, K drafted tokens, H hidden, V vocabulary
"""What a round proposes, be it chains or trees: something that a target reads at once and its logits settle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from farm.decode.sampling import SamplingBatch
from farm.layers.cache import Branches


class ToVerify(NamedTuple):
    """Tokens [B, T] that the target reads, each row's last committed one first; where they stand, if not in line."""

    tokens_BT: Tensor
    branches: Branches | None


@dataclass(frozen=True)
class Settled:
    """What a verification decided, as a chain: row b commits the first `num_accepted_B[b]` + 1 of `tokens_BT`.

    Row b had drafted `lengths[b]` tokens; of a tree those are the depths that were offered. `hidden_BTH` are the
    hidden states of its last committed token and of the accepted ones, `nodes_BT` where in the tree these stand; None
    where they stand in line.
    """

    tokens_BT: Tensor
    num_accepted_B: Tensor
    lengths: tuple[int, ...]
    hidden_BTH: Tensor
    nodes_BT: Tensor | None = None


class Proposal(Protocol):
    """Drafted tokens of a batch. `forwards` counts the draft forwards that they took, 0 when the draft read nothing."""

    @property
    def forwards(self) -> int: ...

    def to_verify(self, last_B: Tensor) -> ToVerify:
        """What the target has to read, given each row's last committed token."""
        ...

    def settle(self, hidden_BTH: Tensor, logits_BTV: Tensor, batch: SamplingBatch) -> Settled:
        """What is accepted by the target's hidden states and logits after each token of `to_verify`."""
        ...


def with_next(drafted_BK: Tensor, num_accepted_B: Tensor, next_B: Tensor) -> Tensor:
    """[B, K + 1]: the accepted tokens of each row and the one that follows; behind it padding."""
    if not drafted_BK.shape[1]:
        return next_B[:, None]
    tokens_BT = torch.cat((drafted_BK, next_B[:, None]), dim=1)
    return tokens_BT.scatter_(1, num_accepted_B[:, None], next_B[:, None])
