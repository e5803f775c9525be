# B rows, K drafted tokens, M nodes of a tree, T tokens, H hidden, V vocabulary
"""Trees in a round: how the target reads them, what it decides, and what of them stays as a chain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from farm.decode.propose import DraftProposal
from farm.decode.propose_tree import TreeProposal
from farm.decode.sampling import ACCEPT, NEXT, SamplingBatch, distribution
from farm.decode.tree import Tree
from farm.decode.verify import Verdict
from farm.decode.verify_tree import TreeVerdict, verify_tree_greedy, verify_tree_sampled
from farm.layers.cache import Branches


def branches(tree: Tree) -> Branches:
    """The trees as a forward reads them: all nodes in one call."""
    return Branches(tree.depths_BM, tree.ancestors())


def decide_tree(proposal: TreeProposal, logits_BMV: Tensor, batch: SamplingBatch) -> TreeVerdict:
    """Verifies trees by the target's logits after each node; only nodes that are reached get a distribution."""
    tree = proposal.tree
    rows_B = torch.arange(len(logits_BMV), device=logits_BMV.device)

    def logits_after(node_B: Tensor) -> Tensor:
        logits_BV = logits_BMV[rows_B, node_B]
        if batch.penalties is None:
            return logits_BV
        paths = {row: [tree.path_tokens(row, int(node_B[row]))] for row in batch.penalties.rows}
        return batch.penalties.apply_to_paths(logits_BV[:, None], paths)[:, 0]

    if batch.greedy:
        return verify_tree_greedy(tree, lambda node_B: logits_after(node_B).argmax(dim=-1))
    # Node n has the number of position n - 1 of a chain; the root's is not used.
    accept_BM = batch.uniforms(tree.tokens_BM.shape[1], ACCEPT).roll(1, dims=1)

    def p_after(node_B: Tensor) -> Tensor:
        return distribution(logits_after(node_B), batch)

    return verify_tree_sampled(tree, p_after, proposal.drawn, accept_BM, batch.uniform(0, NEXT))


class InLine(NamedTuple):
    """Verified trees as the chains that are left of them.

    `drafted` holds the accepted tokens, and as `lengths` how many depths were offered; `hidden_BTH` are the hidden
    states of the root and of the accepted tokens.
    """

    drafted: DraftProposal
    verdict: Verdict
    hidden_BTH: Tensor


def in_line(proposal: TreeProposal, verdict: TreeVerdict, hidden_BMH: Tensor) -> InLine:
    """What a verification accepted, as a chain."""
    nodes_BT = verdict.path.nodes_BP
    tokens_BK = proposal.tree.tokens_BM.gather(1, nodes_BT)[:, 1:]
    offered = tuple(verdict.path.num_offered_B.tolist())
    hidden_BTH = hidden_BMH.gather(1, nodes_BT[..., None].expand(-1, -1, hidden_BMH.shape[2]))
    drafted = DraftProposal(tokens_BK, None, offered, proposal.forwards)
    return InLine(drafted, Verdict(verdict.path.num_accepted_B, verdict.next_B), hidden_BTH)
