# B rows, T draft positions, S unrolled steps
"""How well a draft does on rows that it is not trained on, and what follows: when a run stops, which weights it keeps.

The measure is what the draft is expected to emit a round, teacher-forced.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed, nn

from farm.sections import EarlyStop
from farm.train.batches import Batch
from farm.train.module import DraftLoss


@dataclass(frozen=True)
class Best:
    """The best measurement of a run so far, and the trained weights at it."""

    step: int
    tau: float  # expected, on the held-out rows
    weights: Mapping[str, Tensor] = field(compare=False)  # whole ones by name, on the CPU

    @classmethod
    def of(cls, step: int, tau: float, module: nn.Module) -> Best:
        """With copies of what `module` has now, which ZeRO up to stage 2 keeps whole on every rank."""
        weights = module.named_parameters()
        return cls(step, tau, {name: weight.detach().to("cpu", copy=True) for name, weight in weights})


@torch.no_grad()
def expected_tau(module: DraftLoss, batches: Iterable[Batch], world: int) -> float:
    """1 + sum_s mean_t prod_{j <= s} alpha_{t,j} over the unrolled steps: sampling at temperature 1, all ranks."""
    # Where the module is: NCCL reduces no tensor of the CPU.
    device = next(module.parameters()).device
    sums_S2 = torch.zeros(module.num_steps, 2, dtype=torch.float64, device=device)
    for batch in batches:
        survival_BT: Tensor | None = None
        for step, losses in enumerate(module(batch, alpha=True)):
            mask_BT = batch.mask(step)
            alpha_BT = torch.zeros(mask_BT.shape, device=mask_BT.device)
            alpha_BT[mask_BT] = losses.distribution.alpha_M.float()
            survival_BT = alpha_BT if survival_BT is None else survival_BT * alpha_BT
            sums_S2[step] += torch.stack((survival_BT.double().sum(), mask_BT.double().sum()))
    if world > 1:
        distributed.all_reduce(sums_S2)
    return 1.0 + float((sums_S2[:, 0] / sums_S2[:, 1].clamp(min=1)).sum())


def better(tau: float, best: Best | None) -> bool:
    """Whether a measurement is the best so far, so that its weights are those to keep.

    By tau alone: `min_gain` says when more steps are no longer worth their time (`stops`), and a gain below it is still
    a gain that was paid for. Of equals the later is the better: where the rate decays to zero, it has settled.
    """
    return best is None or tau >= best.tau


def stops(measured: Sequence[tuple[int, float]], settings: EarlyStop) -> bool:
    """Whether the last `patience` measurements (step, expected tau) brought no gain over the best before them.

    A gain is one of `min_gain` at least, relative.
    """
    if len(measured) <= settings.patience:
        return False
    values = [value for _, value in measured]
    before, recent = max(values[: -settings.patience]), max(values[-settings.patience :])
    return recent < before * (1 + settings.min_gain)
