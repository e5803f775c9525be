# B rows, M nodes, W most children of a node
"""Trees of drafted tokens: their shape, and a batch of them.

A top-k tree (EAGLE-2, arXiv 2406.16858, sec. 4) takes its shape from the draft's probabilities, which its point masses
allow; a sampled tree has its shape before anything is drawn, or what is verified would depend on what was drawn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from farm.sections import TreeSettings

MOST_LEVELS = 32  # a target's rotary tables end not far behind its last position
# A static shape expects the first child of a node to be accepted this often, and each later one so much more rarely.
FIRST_CHILD, NEXT_CHILD = 0.6, 0.3
NAME = re.compile(r"tree-(?P<sampled>sampled-)?(?P<width>\d+)x(?P<depth>\d+)(-(?P<nodes>\d+))?")


@dataclass(frozen=True)
class TreeShape:
    """What a round drafts in place of a chain: at most `num_nodes` tokens, `width` children a node, `depth` levels.

    `top-k`: the likeliest children, `width` nodes kept a level, of all seen the best by the product of probabilities.
    `sampled`: children drawn without replacement, in the fixed shape of `static_parents`.
    Raises ValueError for sizes below 1 and depths above MOST_LEVELS.
    """

    kind: Literal["top-k", "sampled"]
    width: int
    depth: int
    num_nodes: int

    def __post_init__(self) -> None:
        if self.kind not in ("top-k", "sampled"):
            raise ValueError(f"tree kind {self.kind!r} is neither top-k nor sampled")
        if min(self.width, self.depth, self.num_nodes) < 1 or self.depth > MOST_LEVELS:
            raise ValueError(f"{self}: every size is at least 1, depth at most {MOST_LEVELS}")

    @classmethod
    def of(cls, settings: TreeSettings) -> TreeShape:
        """As a manifest says it."""
        return cls(settings.kind, settings.width, settings.depth, settings.nodes)

    @classmethod
    def named(cls, name: str) -> TreeShape | None:
        """`tree-WxD-N`, `tree-sampled-WxD-N`, N = W D where it is left out; None for what is no such name.

        Raises ValueError for sizes that no tree has.
        """
        found = NAME.fullmatch(name)
        if found is None:
            return None
        width, depth = int(found["width"]), int(found["depth"])
        return cls(
            "sampled" if found["sampled"] else "top-k", width, depth, int(found["nodes"] or width * depth)
        )

    @property
    def num_entries(self) -> int:
        """Cache entries behind a committed token that a round may write: of verified or of expanded nodes."""
        return max(self.num_nodes, self.width * self.depth)


@dataclass(frozen=True)
class Tree:
    """B trees of M nodes each. Node 0 is the root, the last committed token; parents come before their children.

    Siblings stand in the order in which they were drawn, have different tokens, and are verified in this order.
    `parents_BM` of the root is 0. Where `real_BM` is False there is no token: the row has no draft, or its draft
    had no token left. Such nodes come after their real siblings, have no real child and are never accepted.
    """

    tokens_BM: Tensor
    parents_BM: Tensor
    depths_BM: Tensor  # 0 of the root
    real_BM: Tensor

    def children(self) -> Tensor:
        """Indices [B, M, W] of each node's real children in draw order; 0, nobody's child, behind the last."""
        num_rows, num_nodes = self.parents_BM.shape
        same_BMM = self.parents_BM[:, :, None] == self.parents_BM[:, None, :]
        same_BMM[:, :, 0] = False
        rank_BM = same_BMM.tril(-1).sum(dim=-1)[:, 1:]
        width = int(rank_BM.max()) + 1 if num_nodes > 1 else 0
        table_BMW = self.parents_BM.new_zeros(num_rows, num_nodes, width)
        index_M = torch.arange(1, num_nodes, device=self.parents_BM.device)
        rows_B1 = torch.arange(num_rows, device=self.parents_BM.device)[:, None]
        table_BMW[rows_B1, self.parents_BM[:, 1:], rank_BM] = index_M * self.real_BM[:, 1:]
        return table_BMW

    def ancestors(self) -> Tensor:
        """Which nodes [B, M, M] a node attends to: itself and all above it."""
        num_rows, num_nodes = self.parents_BM.shape
        itself_MM = torch.eye(num_nodes, dtype=torch.bool, device=self.parents_BM.device)
        seen_BMM, above_BM = itself_MM.repeat(num_rows, 1, 1), self.parents_BM
        for _ in range(int(self.depths_BM.max())):
            seen_BMM.scatter_(2, above_BM[..., None], True)
            above_BM = self.parents_BM.gather(1, above_BM)
        return seen_BMM

    def path_tokens(self, row: int, node: int) -> list[int]:
        """The drafted tokens from the root's child down to `node`; none for the root itself."""
        tokens: list[int] = []
        while node:
            tokens.append(int(self.tokens_BM[row, node]))
            node = int(self.parents_BM[row, node])
        return tokens[::-1]


@cache
def static_parents(width: int, depth: int, num_nodes: int) -> tuple[int, ...]:
    """Parents of the root and at most `num_nodes` nodes, level by level: a shape known before anything is drawn.

    The nodes are those that are reached most often if the child of rank j (from 0) is accepted with
    FIRST_CHILD * NEXT_CHILD^j; none of them beats its parent or its earlier siblings, so that the rest is a tree.
    """
    reach, parents, level = [1.0], [0], [0]
    for _ in range(depth):
        grown = [
            (node, reach[node] * FIRST_CHILD * NEXT_CHILD**rank) for node in level for rank in range(width)
        ]
        # No later level can use more than num_nodes of these: whatever comes first here comes first there.
        grown = sorted(grown, key=lambda one: -one[1])[:num_nodes]
        level = list(range(len(parents), len(parents) + len(grown)))
        parents += [node for node, _ in grown]
        reach += [value for _, value in grown]
    best = sorted(range(1, len(parents)), key=lambda node: (-reach[node], node))[:num_nodes]
    kept = [0, *sorted(best)]
    return tuple(kept.index(parents[node]) for node in kept)


def depths_of(parents: Sequence[int]) -> list[int]:
    """Depth of each node, 0 of the root, which comes first."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1)
    return depths
