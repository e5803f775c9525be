# H hidden, F expert width
"""One gated MLP: the shared expert of a trunk, or the private expert of a target."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class Expert(nn.Module):
    """E(n) = D(silu(G n) * (U n)) without biases; n and the result are [..., H]."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)
        self.fused: Any = None  # farm.draft.lean.FusedExpert, of weights that do not change any more

    def forward(self, normed: Tensor) -> Tensor:
        gated = functional.silu(self.gate_proj(normed)) * self.up_proj(normed)
        out: Tensor = self.down_proj(gated)
        return out
