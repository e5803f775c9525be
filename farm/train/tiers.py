# H hidden, F expert width, R rank, I inputs, O outputs of a linear map
"""What of a draft is trained: tiers from a low-rank expert to the whole draft, and what each starts from.

    low-rank    the base's private expert, with W + B A in place of each of its three maps
    expert      a private expert of any width
    expert-fc   an expert, and fc + B A
    expert-lora an expert, and W + B A in fc and in the attention's maps
    eda         an expert, and all of fc (what EDA's release trains)
    full        every tensor of the draft

`eda` and `full` change the trunk; the others leave it as it is, and so can be served beside other targets. `low-rank`
is folded into an expert of the base's width; the changes of `expert-fc` and `expert-lora` stay low-rank and are routed
by row (farm/draft/delta.py).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from farm.config import UserError
from farm.draft.delta import DELTA_PARTS, LowRank, TrunkDelta, another_trunk, part_sizes
from farm.draft.expert import Expert
from farm.draft.model import Draft
from farm.draft.trunk import Trunk
from farm.layers.lora import Part
from farm.sections import Init, Tier

STD: Final = 0.02
MAPS: Final = ("gate_proj", "up_proj", "down_proj")
PACE: Final = 3.0  # of the factors of a trunk's changes: their steps, in those of the other tensors
CHANGED_PARTS: Final[dict[Tier, tuple[Part, ...]]] = {"expert-fc": ("fc",), "expert-lora": DELTA_PARTS}


@dataclass(frozen=True)
class TierShape:
    """A tier's name, the rank of its low-rank maps and its expert's width (None: that of the base's)."""

    tier: Tier
    rank: int
    width: int | None
    init: Init


class LowRankMap(nn.Module):
    """y = W x + B A x with a frozen W; B begins at zero, so that the map begins as W."""

    def __init__(self, weight_OI: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        # In a tuple: no parameter, and nothing that DeepSpeed may cast or broadcast.
        self._frozen = (weight_OI,)
        out, inputs = weight_OI.shape
        self.a_RI = nn.Parameter(_normal((rank, inputs), inputs**-0.5, generator).to(weight_OI.device))
        self.b_OR = nn.Parameter(torch.zeros(out, rank, device=weight_OI.device))

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(functional.linear(x, self.a_RI), self.b_OR)
        return functional.linear(x, self._frozen[0]) + low

    @property
    def weight(self) -> Tensor:
        """W + B A, the map that this one is folded into."""
        return self._frozen[0] + self.b_OR @ self.a_RI


class PacedLowRank(nn.Module):
    """x -> B A x with A = PACE a and B = PACE b.

    Adam moves every number by about the learning rate, whatever the scale of its gradient. Trained in a and b, the
    factors take PACE times larger steps, as LoRA needs beside tensors that are trained whole.
    """

    def __init__(self, num_inputs: int, num_outputs: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.small_a_RX = nn.Parameter(_normal((rank, num_inputs), num_inputs**-0.5 / PACE, generator))
        self.small_b_YR = nn.Parameter(torch.zeros(num_outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        return PACE**2 * functional.linear(functional.linear(x, self.small_a_RX), self.small_b_YR)

    def plain(self) -> LowRank:
        """The same map in its factors."""
        (rank, num_inputs), device = self.small_a_RX.shape, self.small_a_RX.device
        out = LowRank(num_inputs, self.small_b_YR.shape[0], rank).to(device, self.small_a_RX.dtype)
        with torch.no_grad():
            out.a_RX.copy_(PACE * self.small_a_RX)
            out.b_YR.copy_(PACE * self.small_b_YR)
        return out


class TrainedDraft(nn.Module):
    """A draft whose parameters, as a module, are exactly what its tier trains; the rest is held outside the tree."""

    def __init__(
        self, trunk: Trunk, expert: nn.Module, *, owned: nn.Module | None, delta: TrunkDelta | None = None
    ) -> None:
        """`owned` is the part of the trunk that is trained: its fc, the trunk itself, or None.

        `delta` is what is trained beside a trunk that stays as it is.
        """
        super().__init__()
        self.expert = expert
        self.owned = owned
        self.delta = delta
        self._trunk = (trunk,)

    @property
    def trunk(self) -> Trunk:
        return self._trunk[0]

    def as_draft(self) -> Draft:
        """The draft to run; it shares every tensor with this one."""
        return Draft(self._trunk[0], self.expert, self.delta)  # type: ignore[arg-type]

    def folded(self) -> Draft:
        """A plain draft of the same function, in tensors of its own: what the engine decodes with.

        Changes to a trunk that stays as it is are still apart from it.
        """
        trunk, source = copy.deepcopy(another_trunk(self.trunk)), self.expert
        gate_FH = getattr(source, MAPS[0]).weight
        expert = Expert(trunk.config.hidden_size, gate_FH.shape[0]).to(gate_FH.device, gate_FH.dtype)
        with torch.no_grad():
            for name in MAPS:
                getattr(expert, name).weight.copy_(getattr(source, name).weight)
        delta = None
        if self.delta is not None:
            delta = TrunkDelta({part: change.plain() for part, change in self.delta.named_children()})  # type: ignore[misc, operator]
        return Draft(trunk, expert, delta).requires_grad_(False)

    @property
    def num_bytes(self) -> int:
        """Bytes of what is trained, in float32: what a target adds to its family before it is folded."""
        return sum(parameter.numel() * 4 for parameter in self.parameters())


def trained_draft(trunk: Trunk, base_expert: Expert | None, shape: TierShape, seed: int) -> TrainedDraft:
    """The draft of a tier, at its start. `base_expert` is None where there is none, and everything is then random.

    The trunk's tensors are not copied but where they are trained. Raises UserError for an init without its base.
    """
    generator = torch.Generator().manual_seed(seed)
    if shape.tier == "full":
        whole = copy.deepcopy(another_trunk(trunk)).requires_grad_(True)
        return TrainedDraft(whole, _new_expert(trunk, base_expert, shape, generator), owned=whole)
    if shape.tier == "low-rank":
        if base_expert is None or shape.init != "base" or shape.width is not None:
            raise UserError(
                "adapt.tier low-rank: changes the base's expert; leave adapt.init and adapt.width out"
            )
        low = copy.copy(base_expert)
        low._modules = {
            name: LowRankMap(getattr(base_expert, name).weight, shape.rank, generator) for name in MAPS
        }
        return TrainedDraft(trunk, low, owned=None)
    expert = _new_expert(trunk, base_expert, shape, generator)
    if shape.tier == "expert":
        return TrainedDraft(trunk, expert, owned=None)
    if shape.tier == "eda":
        view, fc = another_trunk(trunk), copy.deepcopy(trunk.fc).requires_grad_(True)
        view._modules["fc"] = fc
        return TrainedDraft(view, expert, owned=fc)
    sizes, device = part_sizes(trunk.config), trunk.fc.weight.device
    changes = {
        part: PacedLowRank(*sizes[part], shape.rank, generator).to(device)
        for part in CHANGED_PARTS[shape.tier]
    }
    return TrainedDraft(trunk, expert, owned=None, delta=TrunkDelta(changes))


def _new_expert(trunk: Trunk, base: Expert | None, shape: TierShape, generator: torch.Generator) -> Expert:
    """A trainable expert: the base's, fitted to the width; or random, its output silent for init `zero`."""
    config, device = trunk.config, trunk.fc.weight.device
    base_width = config.private_width if base is None else base.gate_proj.weight.shape[0]
    width = shape.width or base_width
    expert = Expert(config.hidden_size, width).to(device)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.copy_(_normal(tuple(parameter.shape), STD, generator))
        if shape.init == "zero":
            expert.down_proj.weight.zero_()
        elif shape.init == "base":
            if base is None:
                raise UserError(
                    "adapt.init base: there is no base expert to start from; choose zero or random"
                )
            _take_over(expert, base)
    return expert


def _take_over(expert: Expert, base: Expert) -> None:
    """The base's expert in another width: wider, with new neurons that are silent at first; narrower, its largest."""
    gate, up, down = (getattr(base, name).weight for name in MAPS)
    strength_F = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    width = min(expert.gate_proj.weight.shape[0], len(strength_F))
    kept_F = strength_F.topk(width).indices.sort().values
    expert.down_proj.weight[:, width:] = 0.0
    expert.gate_proj.weight[:width] = gate[kept_F]
    expert.up_proj.weight[:width] = up[kept_F]
    expert.down_proj.weight[:, :width] = down[:, kept_F]


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    return torch.empty(shape).normal_(0.0, std, generator=generator)
