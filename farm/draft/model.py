# B rows, T tokens, M of their B T positions, H hidden, V vocabulary, C draft vocabulary
"""A draft: one trunk and what is private, an expert and perhaps changes to the trunk; with the target's head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from farm.draft.config import DraftConfig
from farm.draft.delta import TrunkDelta, with_delta
from farm.draft.expert import Expert
from farm.draft.trunk import Trunk


class Draft(nn.Module):
    """h_{t+1} predicted from x_{t+1} and h_t, in the target's post-norm space (EAGLE-1 alignment)."""

    def __init__(self, trunk: Trunk, expert: Expert, delta: TrunkDelta | None = None) -> None:
        """`delta` is what this target adds to the trunk that it shares with others."""
        super().__init__()
        self.trunk = trunk
        self.expert = expert
        self.delta = delta

    @property
    def config(self) -> DraftConfig:
        return self.trunk.config

    def forward(
        self,
        embedded_BTH: Tensor,
        hidden_BTH: Tensor,
        positions_BT: Tensor,
        remember: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]],
        at_M: Tensor | None = None,
    ) -> Tensor:
        """Predicted hidden state [B, T, H], or [M, H] of some positions; see Trunk.forward for the arguments."""
        residual_BTH, normed_BTH = self.trunk(
            embedded_BTH, hidden_BTH, positions_BT, remember, self.delta, at_M
        )
        predicted: Tensor = residual_BTH + self.expert(normed_BTH)
        return predicted

    def folded(self) -> Draft:
        """The same draft with a trunk of its own, in which the changes are; itself where there are none."""
        return self if self.delta is None else Draft(with_delta(self.trunk, self.delta), self.expert)


@dataclass(frozen=True)
class DraftHead:
    """The target's embedding and head as a draft uses them; the head may be pruned to a draft vocabulary."""

    embedding_VH: Tensor
    weight_CH: Tensor
    vocabulary_C: Tensor | None  # token id of each row of the head, int64; None: the full vocabulary

    @classmethod
    def of(cls, embedding_VH: Tensor, head_VH: Tensor, vocabulary_C: Tensor | None) -> DraftHead:
        weight_CH = head_VH if vocabulary_C is None else head_VH[vocabulary_C].contiguous()
        return cls(embedding_VH, weight_CH, vocabulary_C)

    def embed(self, tokens: Tensor) -> Tensor:
        """[..., H] of token ids [...]."""
        return functional.embedding(tokens, self.embedding_VH)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] of hidden states [..., H]."""
        return functional.linear(hidden, self.weight_CH)

    def token_ids(self, columns: Tensor) -> Tensor:
        """Token ids of columns of `logits`."""
        return columns if self.vocabulary_C is None else self.vocabulary_C[columns]

    def restrict(self, values: Tensor) -> Tensor:
        """The columns [..., C] of [..., V] that the draft can propose."""
        return values if self.vocabulary_C is None else values.index_select(-1, self.vocabulary_C)


def new_draft(config: DraftConfig, seed: int, std: float = 0.02) -> Draft:
    """A randomly initialised draft; both experts' output starts small, fc starts as the mean of its two inputs."""
    draft = Draft(Trunk(config), Expert(config.hidden_size, config.private_width))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, std, generator=generator)
        half = torch.eye(config.hidden_size) * 0.5
        draft.trunk.fc.weight += torch.cat((half, half), dim=1)
    return draft
