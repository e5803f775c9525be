# B rows, W nodes of a level, K children of a node, N candidates, M nodes of a tree, I nodes that get children
# C draft vocabulary
"""Propose a tree: a draft extends each row by several chains that share their beginnings."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from farm.decode.propose import expand
from farm.decode.sampling import DRAFT, SamplingBatch, distribution, draw
from farm.decode.tree import Tree, TreeShape, depths_of, static_parents
from farm.decode.tree_reader import TreeReader
from farm.decode.tree_round import TreeProposal
from farm.decode.verify_tree import Drawn


@torch.inference_mode()
def propose_tree(reader: TreeReader, shape: TreeShape, batch: SamplingBatch) -> TreeProposal:
    """A tree behind what `reader` has read of each row."""
    if shape.kind == "top-k":
        return TreeProposal(_top_k_tree(reader, shape, batch), None, reader.forwards)
    tree, drawn = _sampled_tree(reader, shape, batch)
    return TreeProposal(tree, drawn, reader.forwards)


def _top_k_tree(reader: TreeReader, shape: TreeShape, batch: SamplingBatch) -> Tree:
    """EAGLE-2's dynamic tree (arXiv 2406.16858, sec. 4): expansion and reranking by the product of probabilities.

    The probabilities are the draft's at temperature 1: they rank the nodes and are no part of what is verified.
    """
    level, root_B1 = reader.root, reader.root_B[:, None]
    node_BW, score_BW = torch.zeros_like(root_B1), torch.zeros_like(root_B1, dtype=torch.float32)
    tokens, parents, depths, scores = [root_B1], [node_BW], [node_BW], [score_BW]
    num_candidates = 1
    for depth in range(1, shape.depth + 1):
        log_q_BWC = reader.logits(level, batch).float().log_softmax(dim=-1)
        log_q_BWC = log_q_BWC.masked_fill(log_q_BWC.isnan(), -torch.inf)  # a nan would beat its parent
        best_BWK, column_BWK = log_q_BWC.topk(min(shape.width, log_q_BWC.shape[-1]), dim=-1)
        score_BN = (score_BW[..., None] + best_BWK).flatten(1)
        token_BN = reader.head.token_ids(column_BWK).flatten(1)
        tokens.append(token_BN)
        parents.append(node_BW[..., None].expand_as(best_BWK).flatten(1))
        depths.append(torch.full_like(token_BN, depth))
        scores.append(score_BN)
        if depth < shape.depth:
            kept_BW = _best(score_BN, shape.width)
            score_BW, node_BW = score_BN.gather(1, kept_BW), num_candidates + kept_BW
            level = reader.read(level.pick(kept_BW // best_BWK.shape[2]), token_BN.gather(1, kept_BW))
            num_candidates += score_BN.shape[1]
    columns = (torch.cat(parts, dim=1) for parts in (tokens, parents, depths))
    tree = _rerank(*columns, torch.cat(scores, dim=1), shape.num_nodes)
    return replace(tree, real_BM=tree.real_BM & _real(reader, tree.tokens_BM))


def _rerank(
    tokens_BN: Tensor, parents_BN: Tensor, depths_BN: Tensor, score_BN: Tensor, num_nodes: int
) -> Tree:
    """The root and the best of the others, real where possible at all.

    None beats its parent, and of equals the first counts: they are a tree.
    """
    best_BM = _best(score_BN[:, 1:], num_nodes) + 1
    kept_BM = torch.cat((torch.zeros_like(best_BM[:, :1]), best_BM), dim=1)
    parents_BM = torch.searchsorted(kept_BM, parents_BN.gather(1, kept_BM))
    tokens_BM, depths_BM = tokens_BN.gather(1, kept_BM), depths_BN.gather(1, kept_BM)
    return Tree(tokens_BM, parents_BM, depths_BM, score_BN.gather(1, kept_BM) > -torch.inf)


def _real(reader: TreeReader, tokens_BM: Tensor) -> Tensor:
    """All nodes of rows with a draft; of the others the root."""
    real_BM = reader.drafts_B[:, None].expand_as(tokens_BM).clone()
    real_BM[:, 0] = True
    return real_BM


def _best(score_BN: Tensor, num: int) -> Tensor:
    """Ascending indices of the `num` largest scores of each row; of equal ones the first."""
    ranked_BN = score_BN.sort(dim=1, descending=True, stable=True).indices
    return ranked_BN[:, :num].sort(dim=1).values


def _sampled_tree(reader: TreeReader, shape: TreeShape, batch: SamplingBatch) -> tuple[Tree, Drawn | None]:
    """A tree of static shape whose siblings are drawn from the processed q after their parent."""
    growth = _Growth(reader, static_parents(shape.width, shape.depth, shape.num_nodes), batch)
    level, nodes = reader.root, [0]
    growth.add_children(nodes, reader.logits(level, batch))
    while below := growth.below(nodes):
        index_W = torch.tensor([index for index, _ in below], device=reader.root_B.device)
        nodes = [node for _, node in below]
        parents = level.pick(index_W.expand(len(reader.root_B), -1))
        level = reader.read(parents, growth.tree.tokens_BM[:, nodes])
        growth.add_children(nodes, reader.logits(level, batch))
    return growth.tree, growth.drawn()


class _Growth:
    """Trees of one static shape while they fill with tokens from the root down.

    Greedy rows propose their likeliest tokens, as point masses.
    """

    def __init__(self, reader: TreeReader, parents: tuple[int, ...], batch: SamplingBatch) -> None:
        self._head, self._batch = reader.head, batch
        self._children = [
            [n for n, parent in enumerate(parents) if n and parent == node] for node in range(len(parents))
        ]
        self.tree = _empty_tree(reader, parents)
        # Node n has the number of position n - 1 of a chain; the root's is not used.
        self._u_BM = batch.uniforms(len(parents), DRAFT).roll(1, dims=1).to(reader.root_B.device)
        self._hot_B = (batch.columns.temperature_B > 0).to(reader.root_B.device)
        self._q: list[Tensor] = []
        self._place_M = torch.zeros(len(parents), dtype=torch.int64, device=reader.root_B.device)

    def below(self, nodes: list[int]) -> list[tuple[int, int]]:
        """Children of `nodes` that have children themselves, each with the index of its parent in `nodes`."""
        pairs = ((i, child) for i, node in enumerate(nodes) for child in self._children[node])
        return [(i, child) for i, child in pairs if self._children[child]]

    def add_children(self, nodes: list[int], logits_BIC: Tensor) -> None:
        """Draws the children of `nodes`."""
        b, num, c = logits_BIC.shape
        families = [self._children[node] for node in nodes]
        width = max(map(len, families))
        column_BIK, real_BIK = _likeliest(logits_BIC, width)
        if not self._batch.greedy:
            self._place_M[nodes] = torch.arange(num, device=self._place_M.device) + sum(
                q.shape[1] for q in self._q
            )
            q_MC = distribution(logits_BIC.flatten(0, 1), self._batch.repeat(num))
            self._q.append(q_MC.view(b, num, c))
            # Families smaller than the widest draw on, and what they draw is dropped.
            u_BIK = self._u_BM[:, [[*family, *[0] * (width - len(family))] for family in families]]
            drawn = draw_siblings(q_MC, u_BIK.flatten(0, 1))
            hot_B11 = self._hot_B[:, None, None]
            column_BIK = torch.where(hot_B11, drawn[0].view_as(column_BIK), column_BIK)
            real_BIK = torch.where(hot_B11, drawn[1].view_as(real_BIK), real_BIK)
        tokens_BIK = self._head.token_ids(column_BIK)
        for i, (node, family) in enumerate(zip(nodes, families, strict=True)):
            self.tree.tokens_BM[:, family] = tokens_BIK[:, i, : len(family)]
            self.tree.real_BM[:, family] &= real_BIK[:, i, : len(family)] & self.tree.real_BM[:, node, None]

    def drawn(self) -> Drawn | None:
        """How siblings were drawn; None where all rows are greedy."""
        if self._batch.greedy:
            return None
        q_BIC, rows_B = torch.cat(self._q, dim=1), torch.arange(len(self._hot_B), device=self._hot_B.device)
        return Drawn(lambda node_B: expand(q_BIC[rows_B, self._place_M[node_B]], self._head), self._hot_B)


def draw_siblings(q_BC: Tensor, u_BK: Tensor) -> tuple[Tensor, Tensor]:
    """K columns [B, K] of each row, drawn from q one after the other without replacement, and which of them exist.

    One does not where the row has had all its tokens of positive probability.
    """
    left_BC, columns, real = q_BC.clone(), list[Tensor](), list[Tensor]()
    for u_B in u_BK.unbind(dim=1):
        real.append(left_BC.sum(dim=-1) > 0)
        columns.append(draw(left_BC, u_B))
        left_BC.scatter_(1, columns[-1][:, None], 0.0)
    return torch.stack(columns, dim=1), torch.stack(real, dim=1)


def _likeliest(logits_BIC: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` best columns [B, I, num], best first, and which of them exist: a small vocabulary may have fewer."""
    column_BIK = logits_BIC.topk(min(num, logits_BIC.shape[2]), dim=-1).indices
    missing = num - column_BIK.shape[2]
    real_BIK = torch.ones_like(column_BIK, dtype=torch.bool)
    return functional.pad(column_BIK, (0, missing)), functional.pad(real_BIK, (0, missing))


def _empty_tree(reader: TreeReader, parents: tuple[int, ...]) -> Tree:
    root_B = reader.root_B
    size = (len(root_B), len(parents))
    tokens_BM = torch.zeros(size, dtype=torch.int64, device=root_B.device)
    tokens_BM[:, 0] = root_B
    parents_BM, depths_BM = (
        torch.tensor(x, device=root_B.device).expand(size) for x in (parents, depths_of(parents))
    )
    return Tree(tokens_BM, parents_BM, depths_BM, _real(reader, tokens_BM))
