# B rows, M nodes of a tree, T tokens of a path, H hidden, V vocabulary
"""Trees in a round: what was drafted, how the target reads it, what it decides, and what stays as a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.decode.proposal import Settled, ToVerify, with_next
from farm.decode.sampling import ACCEPT, NEXT, SamplingBatch, distribution
from farm.decode.tree import Tree
from farm.decode.verify_tree import Drawn, TreeVerdict, verify_tree_greedy, verify_tree_sampled
from farm.layers.cache import Branches
from farm.target.model import Reading


@dataclass(frozen=True)
class TreeProposal:
    """A tree a row, how its siblings were drawn (None: all are point masses), and the draft forwards it took."""

    tree: Tree
    drawn: Drawn | None
    forwards: int
    signals: Sequence[Sequence[float]] = ()  # no control looks into trees

    def to_verify(self, last_B: Tensor) -> ToVerify:  # noqa: ARG002 - the roots are the last committed tokens
        """All nodes in one call."""
        return ToVerify(self.tree.tokens_BM, Branches(self.tree.depths_BM, self.tree.ancestors()))

    def settle(self, reading: Reading, batch: SamplingBatch) -> Settled:
        """Follows each tree from its root down and puts the path in line."""
        path, next_B = self._verdict(reading.logits_BTV, batch)
        hidden_BTH = reading.hidden_BTH
        nodes_BT = path.nodes_BP
        drafted_BK = self.tree.tokens_BM.gather(1, nodes_BT)[:, 1:]
        on_path_BTH = hidden_BTH.gather(1, nodes_BT[..., None].expand(-1, -1, hidden_BTH.shape[2]))
        tokens = with_next(drafted_BK.tolist(), path.num_accepted_B.tolist(), next_B.tolist())
        return Settled(tokens, tuple(path.num_offered_B.tolist()), on_path_BTH, nodes_BT)

    def _verdict(self, logits_BMV: Tensor, batch: SamplingBatch) -> TreeVerdict:
        """Only nodes that are reached get a distribution."""
        tree = self.tree
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

        return verify_tree_sampled(tree, p_after, self.drawn, accept_BM, batch.uniform(0, NEXT))
