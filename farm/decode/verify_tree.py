# B rows, M nodes, W most children of a node, P nodes of a path, V vocabulary
"""Lossless verification of drafted trees: pure functions of distributions and uniform numbers.

At a node with the target's p, its children x^1, x^2, ... are offered in draw order, with p^1 = p and q^1 = q:
x^j is accepted with min(1, p^j(x^j) / q^j(x^j)); refused, p^{j+1} = norm(max(p^j - q^j, 0)) and q^{j+1} is q^j
without x^j, renormalised. An accepted child is the next node; where none is, the next token comes from the p^j that
is left, at a leaf from p itself. Children of a top-k tree are point masses: q^j is 1 at x^j, so x^j is accepted with
p^j(x^j). (Recursive rejection sampling without replacement: Jeon et al., arXiv 2402.14160, alg. 1.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from farm.decode.sampling import draw
from farm.decode.tree import Tree

# Something of the position that follows node `node_B[b]` of row b: a distribution [B, V], or the best token [B].
AfterNodes = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Drawn:
    """How siblings were drawn: those of `rows_B` without replacement from q, those of other rows are point masses.

    `q_after` gives the draft's processed distributions, 0 outside a pruned draft vocabulary.
    """

    q_after: AfterNodes
    rows_B: Tensor


@dataclass(frozen=True)
class TreePath:
    """The accepted nodes of each row.

    `nodes_BP` are indices from the root's 0 down, the last accepted one repeated behind it. `num_offered_B` counts the
    nodes of the path that had children: `num_accepted_B`, or one more where all children of the last were refused.
    """

    nodes_BP: Tensor
    num_accepted_B: Tensor
    num_offered_B: Tensor


@dataclass(frozen=True)
class Walk:
    """A verification before its last draw."""

    path: TreePath
    follow_BV: Tensor  # distribution of the token after the path, float64 and not normalised


class TreeVerdict(NamedTuple):
    """What one verification decided: the accepted nodes, and the token that follows them."""

    path: TreePath
    next_B: Tensor


def verify_tree_greedy(tree: Tree, best_after: AfterNodes) -> TreeVerdict:
    """Follows the target's argmax, which `best_after` gives, for as long as a child has that token."""
    best_B = torch.zeros_like(tree.tokens_BM[:, 0])

    def choose(node_B: Tensor, children_BW: Tensor) -> Tensor:
        # A row that has stopped stays at its node and gets the same token again.
        best_B.copy_(best_after(node_B))
        agrees_BW = tree.tokens_BM.gather(1, children_BW) == best_B[:, None]
        return (children_BW * agrees_BW).sum(dim=1)

    return TreeVerdict(_descend(tree, choose), best_B)


def verify_tree_sampled(
    tree: Tree, p_after: AfterNodes, drawn: Drawn | None, accept_BM: Tensor, next_u_B: Tensor
) -> TreeVerdict:
    """Recursive rejection sampling, see `walk_tree`; `next_u_B` are the uniform numbers of the token that follows."""
    walk = walk_tree(tree, p_after, drawn, accept_BM)
    return TreeVerdict(walk.path, draw(walk.follow_BV, next_u_B))


def walk_tree(tree: Tree, p_after: AfterNodes, drawn: Drawn | None, accept_BM: Tensor) -> Walk:
    """Which nodes are accepted, and what the next token is to be drawn from.

    Args:
        p_after: the target's processed distributions [B, V], each of its node's own path.
        drawn: how siblings were drawn; None: all of them are point masses.
        accept_BM: a uniform number in [0, 1) for each node, float64; the root's is not used.
    """
    offers = _Offers(tree, p_after, drawn, accept_BM)
    path = _descend(tree, offers.choose)
    return Walk(path, offers.follow_BV)


def residual(p_BV: Tensor, q_BV: Tensor) -> Tensor:
    """norm(max(p - q, 0)): what is left of p once a token drawn from q was refused. Where rounding leaves none, p."""
    left_BV = (p_BV - q_BV).clamp(min=0.0)
    total_B1 = left_BV.sum(dim=-1, keepdim=True)
    return torch.where(total_B1 > 0, left_BV / total_B1, p_BV)


def without(q_BV: Tensor, token_B: Tensor) -> Tensor:
    """q with a drawn token taken out, renormalised; all 0 where no other token is left."""
    left_BV = q_BV.scatter(1, token_B[:, None], 0.0)
    total_B1 = left_BV.sum(dim=-1, keepdim=True)
    return left_BV / torch.where(total_B1 > 0, total_B1, 1.0)


class _Offers:
    """What has been offered so far, and what is left of p where a row stands."""

    def __init__(self, tree: Tree, p_after: AfterNodes, drawn: Drawn | None, accept_BM: Tensor) -> None:
        self._tree, self._p_after, self._drawn = tree, p_after, drawn
        self._accept_BM = accept_BM.to(tree.tokens_BM.device)
        self._going_B = torch.ones_like(tree.tokens_BM[:, 0], dtype=torch.bool)
        self.follow_BV = torch.empty(0)

    def choose(self, node_B: Tensor, children_BW: Tensor) -> Tensor:
        """Offers the children of each row's node one after the other; the accepted one, 0 where there is none."""
        p_BV = self._p_after(node_B).to(torch.float64)
        q_BV = None if self._drawn is None else self._drawn.q_after(node_B).to(torch.float64)
        child_B = torch.zeros_like(node_B)
        for next_B in children_BW.unbind(dim=1):
            offered_B = (next_B > 0) & (child_B == 0)
            if not bool(offered_B.any()):
                break
            token_B = self._tree.tokens_BM.gather(1, next_B[:, None]).squeeze(1)
            offer_BV = self._offer(p_BV, q_BV, token_B)
            u_B = self._accept_BM.gather(1, next_B[:, None]).squeeze(1)
            accepted_B = offered_B & (u_B < self._ratio(token_B, offered_B, p_BV, offer_BV))
            child_B = torch.where(accepted_B, next_B, child_B)
            refused_B1 = (offered_B & ~accepted_B)[:, None]
            p_BV = torch.where(refused_B1, residual(p_BV, offer_BV), p_BV)
            if q_BV is not None:
                q_BV = torch.where(refused_B1, without(q_BV, token_B), q_BV)
        stays_BV = self.follow_BV if len(self.follow_BV) else p_BV
        self.follow_BV = torch.where(self._going_B[:, None], p_BV, stays_BV)
        self._going_B = child_B > 0
        return child_B

    def _offer(self, p_BV: Tensor, q_BV: Tensor | None, token_B: Tensor) -> Tensor:
        """The distribution that each row's token comes from."""
        point_BV = torch.zeros_like(p_BV).scatter_(1, token_B[:, None], 1.0)
        if q_BV is None or self._drawn is None:
            return point_BV
        return torch.where(self._drawn.rows_B.to(q_BV.device)[:, None], q_BV, point_BV)

    def _ratio(self, token_B: Tensor, offered_B: Tensor, p_BV: Tensor, offer_BV: Tensor) -> Tensor:
        """With what probability each offered token is accepted."""
        p_B, q_B = (x_BV.gather(1, token_B[:, None]).squeeze(1) for x_BV in (p_BV, offer_BV))
        assert bool((q_B > 0)[offered_B].all()), (
            "a node's token has probability 0 under what it is drawn from"
        )
        return (p_B / q_B).clamp(max=1.0)


def _descend(tree: Tree, choose: Callable[[Tensor, Tensor], Tensor]) -> TreePath:
    """Goes down from the root for as long as `choose(node_B, children_BW)` gives a child and not 0.

    Rows that have stopped are asked on, without children.
    """
    children_BMW = tree.children()
    rows_B = torch.arange(len(children_BMW), device=children_BMW.device)
    node_B = torch.zeros_like(rows_B)
    going_B, num_offered_B = torch.ones_like(rows_B, dtype=torch.bool), torch.zeros_like(rows_B)
    nodes = [node_B]
    while True:
        children_BW = children_BMW[rows_B, node_B] * going_B[:, None]
        num_offered_B = num_offered_B + (children_BW > 0).any(dim=1)
        child_B = choose(node_B, children_BW)
        going_B = child_B > 0
        if not bool(going_B.any()):
            break
        node_B = torch.where(going_B, child_B, node_B)
        nodes.append(node_B)
    nodes_BP = torch.stack(nodes, dim=1)
    return TreePath(nodes_BP, (nodes_BP.diff(dim=1) > 0).sum(dim=1), num_offered_B)
