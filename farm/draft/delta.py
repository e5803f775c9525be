# H hidden, X inputs, Y outputs, R rank
"""What a target changes in its trunk: W + B A in place of fc, of q/k/v together, of the attention's output map.

The trunk itself stays as it is, so that targets share it: decoding adds each row's low-rank products to the products
that all rows have in common (farm/draft/routed.py); an export folds them into the trunk's maps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from farm.draft.config import DraftConfig
from farm.draft.trunk import Trunk
from farm.layers.lora import Lora, Part

DELTA_PARTS: Final[tuple[Part, ...]] = ("fc", "qkv", "out")


class LowRank(nn.Module):
    """x -> B A x (LoRA, arXiv 2106.09685, eq. 3); B is zero at first."""

    def __init__(self, num_inputs: int, num_outputs: int, rank: int) -> None:
        super().__init__()
        self.a_RX = nn.Parameter(torch.zeros(rank, num_inputs))
        self.b_YR = nn.Parameter(torch.zeros(num_outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.linear(x, self.a_RX), self.b_YR)

    @property
    def product_YX(self) -> Tensor:  # noqa: N802 - a tensor's name carries its shape
        """B A."""
        return self.b_YR @ self.a_RX


class TrunkDelta(nn.Module):
    """The low-rank changes of one target, by part; a part that is absent is not changed."""

    def __init__(self, parts: Mapping[Part, nn.Module]) -> None:
        """Each module is a `LowRank`, or has its attributes."""
        super().__init__()
        for part, change in parts.items():
            self.add_module(part, change)

    @classmethod
    def empty(cls, config: DraftConfig, ranks: Mapping[Part, int]) -> TrunkDelta:
        """All zeros, of the given rank by part."""
        sizes = part_sizes(config)
        return cls({part: LowRank(*sizes[part], ranks[part]) for part in DELTA_PARTS if part in ranks})

    def change(self, part: Part) -> nn.Module | None:
        """What is added to one product; None: nothing."""
        return self._modules.get(part)

    def lora(self) -> Lora:
        """The same in the form in which rows are routed; one layer, 0."""
        factors = {}
        for part in DELTA_PARTS:
            change: Any = self.change(part)
            if change is not None:
                factors[0, part] = (change.a_RX.detach().t(), change.b_YR.detach().t())
        return Lora.of(factors)


def part_sizes(config: DraftConfig) -> dict[Part, tuple[int, int]]:
    """Inputs and outputs of the maps that a target may change."""
    h, queries = config.hidden_size, config.num_heads * config.head_dim
    return {
        "fc": (2 * h, h),
        "qkv": (h, queries + 2 * config.num_kv_heads * config.head_dim),
        "out": (queries, h),
    }


@torch.no_grad()
def with_delta(trunk: Trunk, delta: TrunkDelta | None) -> Trunk:
    """A frozen trunk with the changes added to its maps; tensors that no change touches are shared with `trunk`."""
    if delta is None:
        return trunk
    changed: dict[str, Tensor] = {}
    changes: dict[str, Any] = dict(delta.named_children())
    for name, change in changes.items():
        product_YX = change.product_YX.detach()
        if name == "qkv":
            names = ("q_proj", "k_proj", "v_proj")
            rows = [getattr(trunk, one).weight.shape[0] for one in names]
            changed |= dict(zip(names, product_YX.split(rows), strict=True))
        else:
            changed["o_proj" if name == "out" else name] = product_YX
    view = another_trunk(trunk)
    for name, product_YX in changed.items():
        weight_YX = getattr(trunk, name).weight
        bare = nn.Linear(1, 1, bias=False)
        bare.weight = nn.Parameter(weight_YX + product_YX.to(weight_YX), requires_grad=False)
        view._modules[name] = bare
    return view


def another_trunk(trunk: Trunk) -> Trunk:
    """Another trunk over the same tensors, of which modules can be replaced; not fused yet."""
    view = copy.copy(trunk)
    view._modules = dict(trunk._modules)
    view.fused = None
    return view
