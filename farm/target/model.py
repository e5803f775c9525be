# B rows, T tokens, H hidden, V vocabulary
"""What decoding needs of a target's model: the lean forward and the reference both have it."""

from __future__ import annotations

from collections.abc import Sized
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from farm.layers.cache import AnyRows, SlotCache
from farm.layers.dense import Dense
from farm.layers.lora import LoraRows


class Reading(NamedTuple):
    """What a target says of B x T tokens it has read: post-norm hidden states, and the logits of what follows each."""

    hidden_BTH: Tensor
    logits_BTV: Tensor
    best_BT: Tensor | None = None  # the token of the largest logit, where it came with them


class TargetModel(Protocol):
    """Post-norm hidden states out of a slot cache, logits out of hidden states, and the sizes of both."""

    @property
    def capturable(self) -> bool:
        """Whether a call with StaticRows never waits for the host, so that it can be captured as a CUDA graph."""
        ...

    @property
    def layers(self) -> Sized: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def embedding(self) -> Tensor:
        """[V, H]."""
        ...

    @property
    def head_weight(self) -> Tensor:
        """[V, H]; what the logits take besides (a bias, a scale) is not in it."""
        ...

    @property
    def head(self) -> Dense:
        """The head's linear part, for drafts of a full vocabulary."""
        ...

    @property
    def num_bytes(self) -> int:
        """Of weights in memory."""
        ...

    def new_cache(self, num_slots: int, capacity: int) -> SlotCache:
        """A cache for `num_slots` sequences of at most `capacity` positions."""
        ...

    def forward(
        self, tokens_BT: Tensor, rows: AnyRows, cache: SlotCache, loras: LoraRows | None = None
    ) -> Tensor:
        """Post-norm hidden states [B, T, H] of the tokens, each at its row's start + index; the cache is extended.

        Raises ValueError for `loras` where the model cannot take any.
        """
        ...

    def read(
        self, tokens_BT: Tensor, rows: AnyRows, cache: SlotCache, loras: LoraRows | None = None
    ) -> Reading:
        """As `forward`, with the logits after every token."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits [..., V] of post-norm hidden states [..., H]."""
        ...
