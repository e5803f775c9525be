# B rows, K drafted tokens, T = K + 1, H hidden, V vocabulary
"""Chains in a round: what was drafted, what the target reads of it and what it decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farm.decode.proposal import Settled, ToVerify, with_next
from farm.decode.sampling import ACCEPT, NEXT, SamplingBatch, distribution
from farm.decode.verify import Verdict, verify_greedy, verify_sampled
from farm.target.model import Reading


@dataclass(frozen=True)
class ChainProposal:
    """Drafted chains of K columns, of which row b has `lengths[b]`; the rest of a row is padding.

    `q_BKV` are the distributions that sampled tokens were drawn from, over the full vocabulary. `forwards` counts the
    draft forwards, 0 when the draft has read nothing; `signals` are what the control was told, see RoundResult.
    """

    tokens_BK: Tensor
    q_BKV: Tensor | None
    lengths: tuple[int, ...]
    forwards: int
    signals: Sequence[Sequence[float]] = ()

    @classmethod
    def none(cls, num_rows: int, device: torch.device) -> ChainProposal:
        """Nothing drafted and nothing read."""
        return cls(torch.empty(num_rows, 0, dtype=torch.int64, device=device), None, (0,) * num_rows, 0)

    def to_verify(self, last_B: Tensor) -> ToVerify:
        """The last committed token and the drafted ones, in line."""
        if not self.tokens_BK.shape[1]:
            return ToVerify(last_B[:, None], None)
        return ToVerify(torch.cat((last_B[:, None], self.tokens_BK), dim=1), None)

    def settle(self, reading: Reading, batch: SamplingBatch) -> Settled:
        """Verifies every position that was drafted."""
        drafted = self.tokens_BK.tolist()
        if batch.greedy:
            best = self._best(reading, batch, drafted)
            num_accepted = verify_greedy(drafted, best, self.lengths)
            following = [choices[num] for choices, num in zip(best, num_accepted, strict=True)]
        else:
            verdict = self._verdict(reading.logits_BTV, batch, drafted)
            num_accepted, following = verdict.num_accepted_B.tolist(), verdict.next_B.tolist()
        return Settled(with_next(drafted, num_accepted, following), self.lengths, reading.hidden_BTH)

    def _best(self, reading: Reading, batch: SamplingBatch, drafted: list[list[int]]) -> list[list[int]]:
        """The target's choice at every position, [B][K + 1]."""
        if batch.penalties is not None:
            return batch.penalties.apply(reading.logits_BTV, drafted).argmax(dim=-1).tolist()
        best_BT = reading.logits_BTV.argmax(dim=-1) if reading.best_BT is None else reading.best_BT
        return best_BT.tolist()

    def _verdict(self, logits_BTV: Tensor, batch: SamplingBatch, drafted: list[list[int]]) -> Verdict:
        lengths_B = torch.tensor(self.lengths, device=logits_BTV.device)
        if batch.penalties is not None:
            logits_BTV = batch.penalties.apply(logits_BTV, drafted)
        p_BTV = distribution(logits_BTV.flatten(0, 1), batch.repeat(logits_BTV.shape[1])).view_as(logits_BTV)
        k = self.tokens_BK.shape[1]
        q_BKV = p_BTV[:, :0] if self.q_BKV is None else self.q_BKV
        accept_BK = batch.uniforms(k, ACCEPT)
        next_B = batch.uniform(0, NEXT)
        return verify_sampled(self.tokens_BK, p_BTV, q_BKV, accept_BK, next_B, lengths_B)
