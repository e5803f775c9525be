# B rows, T tokens, K drafted tokens, H hidden, V vocabulary
"""What a round proposes, be it chains or trees: something that a target reads at once and its logits settle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from farm.decode.sampling import SamplingBatch
from farm.layers.cache import Branches
from farm.target.model import Reading


class ToVerify(NamedTuple):
    """Tokens [B, T] that the target reads, each row's last committed one first; where they stand, if not in line."""

    tokens_BT: Tensor
    branches: Branches | None


@dataclass(frozen=True)
class Settled:
    """What a verification decided, as a chain: row b commits `tokens[b]`, the accepted ones and the one that follows.

    Row b had drafted `lengths[b]` tokens; of a tree those are the depths that were offered. `hidden_BTH` are the
    hidden states of its last committed token and of the accepted ones, `nodes_BT` where in the tree these stand; None
    where they stand in line.
    """

    tokens: list[list[int]]
    lengths: tuple[int, ...]
    hidden_BTH: Tensor
    nodes_BT: Tensor | None = None


class Proposal(Protocol):
    """Drafted tokens of a batch. `forwards` counts the draft forwards that they took, 0 when the draft read nothing."""

    @property
    def forwards(self) -> int: ...

    @property
    def signals(self) -> Sequence[Sequence[float]]:
        """What the control was told of the drafted positions, see RoundResult."""
        ...

    def to_verify(self, last_B: Tensor) -> ToVerify:
        """What the target has to read, given each row's last committed token."""
        ...

    def settle(self, reading: Reading, batch: SamplingBatch) -> Settled:
        """What is accepted by what the target says of each token of `to_verify`."""
        ...


def with_next(
    drafted: Sequence[Sequence[int]], num_accepted: Sequence[int], following: Sequence[int]
) -> list[list[int]]:
    """The accepted tokens of each row and the one that follows."""
    rows = zip(drafted, num_accepted, following, strict=True)
    return [[*tokens[:num], token] for tokens, num, token in rows]
