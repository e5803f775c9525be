"""Every tier begins as it says, trains exactly its own tensors, and folds into a draft of the same function."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farm.config import UserError
from farm.draft.checkpoint import build_trunk, trunk_digest
from farm.draft.config import DraftConfig
from farm.draft.expert import Expert
from farm.draft.model import Draft, new_draft
from farm.draft.trunk import Trunk
from farm.train.tiers import TierShape, TrainedDraft, trained_draft
from farm.train.unroll import unroll

CONFIG = DraftConfig(
    hidden_size=16, num_heads=2, num_kv_heads=1, head_dim=8, shared_width=24, private_width=20,
    rms_eps=1e-6, rope_theta=10_000.0, vocab_size=32,
)  # fmt: skip
TIERS = ["low-rank", "expert", "expert-fc", "expert-lora", "eda", "full"]
SHAPE = TierShape("expert", 4, None, "base")


@pytest.fixture
def base() -> tuple[Trunk, Expert]:
    """A frozen trunk over given tensors and the base's private expert, in float64."""
    draft = new_draft(CONFIG, seed=1, std=0.3).double()
    return build_trunk(CONFIG, draft.trunk.state_dict()), draft.expert.requires_grad_(False)


def run(draft: Draft) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    embedded, hidden = torch.randn(2, 2, 9, 16, generator=generator, dtype=torch.float64)
    return torch.stack(unroll(draft, embedded, hidden, 2))


def made(base: tuple[Trunk, Expert], **changes: object) -> TrainedDraft:
    return trained_draft(*base, replace(SHAPE, **changes), seed=3).double()


def shaken(trained: TrainedDraft) -> TrainedDraft:
    """With every trained tensor moved, as after some steps."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return trained


@pytest.mark.parametrize("tier", TIERS)
def test_started_from_the_base_every_tier_is_the_base_draft(base: tuple[Trunk, Expert], tier: str) -> None:
    torch.testing.assert_close(run(made(base, tier=tier).as_draft()), run(Draft(*base)))


@pytest.mark.parametrize("tier", TIERS)
def test_a_folded_draft_is_the_trained_one_and_shares_no_tensor_with_it(
    base: tuple[Trunk, Expert], tier: str
) -> None:
    trained = shaken(made(base, tier=tier))
    folded = trained.folded()
    expected = run(trained.as_draft())
    torch.testing.assert_close(run(folded), expected)
    torch.testing.assert_close(run(folded.folded()), expected)
    assert (expected - run(Draft(*base))).abs().max() > 1e-2
    for parameter in folded.parameters():
        parameter.zero_()
    torch.testing.assert_close(run(trained.as_draft()), expected)


@pytest.mark.parametrize("tier", TIERS)
def test_every_trained_tensor_gets_a_gradient_and_the_trunk_none(
    base: tuple[Trunk, Expert], tier: str
) -> None:
    before = trunk_digest(base[0].state_dict())
    trained = shaken(made(base, tier=tier))
    run(trained.as_draft()).square().sum().backward()
    names = [name for name, parameter in trained.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert not names
    assert all(parameter.grad is None for parameter in (*base[0].parameters(), *base[1].parameters()))
    assert trunk_digest(base[0].state_dict()) == before


def test_what_is_trained_grows_from_tier_to_tier(base: tuple[Trunk, Expert]) -> None:
    h, f, rank = 16, 20, 4
    assert made(base, tier="low-rank").num_bytes == 4 * 3 * rank * (h + f)
    assert made(base, tier="expert").num_bytes == 4 * 3 * h * f
    assert made(base, tier="expert-fc").num_bytes == 4 * (3 * h * f + rank * 3 * h)
    # q/k/v have 32 outputs together, the heads that the output map reads 16
    assert made(base, tier="expert-lora").num_bytes == 4 * (3 * h * f + rank * (3 * h + 3 * h + 2 * h))
    assert made(base, tier="eda").num_bytes == 4 * (3 * h * f + 2 * h * h)
    whole = sum(p.numel() for p in Draft(*base).parameters())
    assert made(base, tier="full").num_bytes == 4 * whole


def test_a_wider_expert_begins_as_the_base_and_a_narrower_one_keeps_its_largest_neurons(
    base: tuple[Trunk, Expert],
) -> None:
    torch.testing.assert_close(run(made(base, width=32).as_draft()), run(Draft(*base)))
    quiet = torch.tensor([1, 7, 13])
    base[1].down_proj.weight[:, quiet] = 0.0
    torch.testing.assert_close(run(made(base, width=17).as_draft()), run(Draft(*base)))
    assert made(base, width=17).expert.gate_proj.weight.shape == (17, 16)


def test_the_starts_differ_as_they_say(base: tuple[Trunk, Expert]) -> None:
    silent = Expert(16, 20).double().requires_grad_(False)
    silent.down_proj.weight.zero_()
    torch.testing.assert_close(run(made(base, init="zero").as_draft()), run(Draft(base[0], silent)))
    random = run(made(base, init="random").as_draft())
    assert (random - run(Draft(base[0], silent))).abs().max() > 1e-4
    assert (random - run(Draft(*base))).abs().max() > 1e-2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda trunk, base: trained_draft(trunk, None, SHAPE, 0),
        lambda trunk, base: trained_draft(trunk, base, replace(SHAPE, tier="low-rank", width=8), 0),
        lambda trunk, base: trained_draft(trunk, base, replace(SHAPE, tier="low-rank", init="zero"), 0),
    ],
)
def test_a_start_that_does_not_exist_is_refused(
    base: tuple[Trunk, Expert], wrong: Callable[[Trunk, Expert], TrainedDraft]
) -> None:
    with pytest.raises(UserError, match="init"):
        wrong(*base)
