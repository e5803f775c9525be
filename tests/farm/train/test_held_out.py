"""When a run stops, which weights it keeps, and what its held-out measure is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farm.data.features import Sample
from farm.draft.config import DraftConfig
from farm.draft.model import DraftHead, new_draft
from farm.sections import EarlyStop
from farm.train.batches import collate
from farm.train.filtering import reference_losses
from farm.train.held_out import Best, better, expected_tau, stops
from farm.train.loss import acceptance
from farm.train.module import DraftLoss
from farm.train.tiers import TrainedDraft
from farm.train.unroll import unroll


@pytest.mark.parametrize(
    ("values", "stopped"),
    [
        ([1.0, 1.1, 1.2], False),  # too few to judge
        ([1.0, 1.1, 1.2, 1.3], False),
        ([1.0, 1.3, 1.2, 1.2], False),  # the best is among the last three
        ([1.3, 1.3, 1.2, 1.3], True),  # as good as before is no gain
        ([1.0, 2.0, 1.9, 1.9, 2.001], True),
        ([1.0, 2.0, 1.9, 1.9, 2.01], False),
    ],
)
def test_a_run_stops_when_its_last_measurements_brought_nothing(values: list[float], stopped: bool) -> None:
    measured = list(enumerate(values))
    assert stops(measured, EarlyStop(patience=3, min_gain=0.002)) is stopped


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([1.0], 0),
        ([1.0, 1.2, 1.1], 1),
        ([1.0, 1.2, 1.2001], 2),  # below any min_gain, and still better weights
        ([1.2, 1.1, 1.2, 1.1], 2),  # of equals the later
    ],
)
def test_the_best_measurement_is_the_highest_and_of_equals_the_last(values: list[float], step: int) -> None:
    best: Best | None = None
    for number, value in enumerate(values):
        if better(value, best):
            best = Best(number, value, {})
    assert best is not None
    assert best.step == step


def test_the_weights_that_are_kept_do_not_follow_those_that_are_trained() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    best = Best.of(4, 1.5, module)
    with torch.no_grad():
        module.weight.add_(1.0)
    assert torch.equal(best.weights["weight"], before)
    assert {weight.device.type for weight in best.weights.values()} == {"cpu"}


def test_expected_tau_is_the_mean_product_of_acceptances_in_any_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    draft = new_draft(DraftConfig(16, 2, 1, 8, 24, 20, 1e-6, 10_000.0, 32), seed=2, std=0.3).requires_grad_(
        False
    )
    weight = torch.randn(32, 16, generator=generator)
    head = DraftHead(weight, weight, None)
    samples = [
        Sample(
            torch.randint(0, 32, (n,), generator=generator), torch.randn(n - 1, 16, generator=generator), 3
        )
        for n in (9, 13, 7)
    ]
    products: list[list[float]] = [[], []]
    for sample in samples:  # one row at a time, one position at a time
        h = sample.features_TH
        steps = unroll(draft, head.embed(sample.tokens_T[None, 1:]), h[None], 2)
        for t in range(2, len(sample.tokens_T) - 2):
            survival = 1.0
            for s in range(2):
                if t + s <= len(sample.tokens_T) - 3:
                    q, p = head.logits(steps[s][0, t]), head.logits(h[t + 1 + s])
                    survival *= float(acceptance(q[None], p[None]))
                    products[s].append(survival)
    expected = 1.0 + sum(sum(values) / len(values) for values in products)
    module = DraftLoss(TrainedDraft(draft.trunk, draft.expert, owned=None), head, 2, "kl")
    assert expected_tau(module, [collate(samples)], 1) == pytest.approx(expected, abs=1e-4)
    assert expected_tau(module, [collate(samples[:1]), collate(samples[1:])], 1) == pytest.approx(
        expected, abs=1e-4
    )


class Elsewhere(nn.Module):
    """A module whose device is not the CPU, on any machine."""

    num_steps = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device="meta"))


@pytest.mark.parametrize(
    "measure",
    [lambda module: expected_tau(module, [], 2), lambda module: reference_losses(module, [], 3, 4, 2)],
    ids=["held out", "reference"],
)
def test_what_ranks_sum_is_where_the_module_is(
    monkeypatch: pytest.MonkeyPatch, measure: Callable[[Any], object]
) -> None:
    """Of GPUs, NCCL sums no tensor of the CPU."""
    devices = []

    def all_reduce(value: Tensor) -> None:
        devices.append(value.device.type)
        raise InterruptedError

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    with pytest.raises(InterruptedError):
        measure(Elsewhere())
    assert devices == ["meta"]
