# B rows, T draft positions, M masked positions, H hidden
"""What training computes faster must stay what the definition says, to the gradient of every private tensor."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from farm.data.features import Sample
from farm.draft.checkpoint import build_trunk
from farm.draft.config import DraftConfig
from farm.draft.expert import Expert
from farm.draft.model import DraftHead, new_draft
from farm.draft.trunk import Trunk
from farm.train.batches import Batch, collate
from farm.train.loss import LOSSES, STEP_DECAY, smooth_l1
from farm.train.module import DraftLoss, Learned, mean_loss
from farm.train.tiers import TierShape, TrainedDraft, trained_draft
from farm.train.unroll import shift, unroll

CONFIG = DraftConfig(
    hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=4, shared_width=24, private_width=20,
    rms_eps=1e-6, rope_theta=10_000.0, vocab_size=32,
)  # fmt: skip
LENGTHS = ((9, 3), (14, 6), (6, 2), (11, 8))  # tokens of a row, and those of its prompt
HIDDEN_WEIGHT = 5.0
Gradients = dict[str, Tensor]
Case = tuple[Trunk, Expert, DraftHead, Batch]


@pytest.fixture(scope="module")
def case() -> Case:
    """A frozen trunk, the base's expert, a pruned head, ragged rows with prompts; in float64."""
    draft = new_draft(CONFIG, seed=1, std=0.3).double()
    generator = torch.Generator().manual_seed(2)
    weight_VH, embedding_VH = torch.randn(2, 32, 16, generator=generator, dtype=torch.float64)
    samples = [
        Sample(
            torch.randint(0, 32, (length,), generator=generator),
            torch.randn(length - 1, 16, generator=generator, dtype=torch.float64),
            prompt,
        )
        for length, prompt in LENGTHS
    ]
    head = DraftHead.of(embedding_VH, weight_VH, torch.arange(0, 32, 2))
    trunk = build_trunk(CONFIG, draft.trunk.state_dict())
    return trunk, draft.expert.requires_grad_(False), head, collate(samples)


def trained_of(case: Case, tier: str) -> TrainedDraft:
    """A tier with every trained tensor moved, as after some steps."""
    shape = replace(TierShape("expert", 4, None, "base"), tier=tier)
    trained = trained_draft(case[0], case[1], shape, seed=3).double()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return trained


def gradients_of(loss: Tensor, trained: TrainedDraft) -> Gradients:
    loss.backward()
    return {name: parameter.grad for name, parameter in trained.named_parameters()}


def plain(case: Case, tier: str, num_steps: int, loss: str) -> Gradients:
    """Everything at all positions by autograd, and then the masked ones."""
    trained, head, batch = trained_of(case, tier), case[2], case[3]
    total = torch.zeros((), dtype=torch.float64)
    predicted = unroll(trained.as_draft(), head.embed(batch.next_tokens_BT), batch.hidden_BTH, num_steps)
    for step, predicted_BTH in enumerate(predicted):
        mask_BT = batch.mask(step)
        x_MH, h_MH = predicted_BTH[mask_BT], shift(batch.hidden_BTH, step + 1)[mask_BT]
        losses_M = LOSSES[loss](head.logits(x_MH), head.logits(h_MH)) + HIDDEN_WEIGHT * smooth_l1(x_MH, h_MH)
        total = total + STEP_DECAY**step * losses_M.mean()
    return gradients_of(total, trained)


def fast(case: Case, tier: str, num_steps: int, loss: str) -> Gradients:
    """As a run computes them."""
    trained, batch = trained_of(case, tier), case[3]
    steps = DraftLoss(trained, case[2], num_steps, loss)(batch)
    counts = [batch.mask(step).sum() for step in range(num_steps)]
    learned = tuple(Learned(count, count) for count in counts)
    return gradients_of(mean_loss(steps, learned, HIDDEN_WEIGHT, 1), trained)


def without_the_prompts_keys(case: Case, tier: str, num_steps: int, loss: str) -> Gradients:
    """Wrong: what no loss is taken at is left out of attention too."""
    trunk, expert, head, batch = case
    hidden_BTH = batch.hidden_BTH.where(batch.mask(0)[..., None], 0.0)
    return fast((trunk, expert, head, replace(batch, hidden_BTH=hidden_BTH)), tier, num_steps, loss)


def one_position_late(case: Case, tier: str, num_steps: int, loss: str) -> Gradients:
    """Wrong: the positions that are picked are not those of the mask."""
    trunk, expert, head, batch = case
    before_BT = torch.cat((torch.full_like(batch.turn_BT[:, :1], -1), batch.turn_BT[:, :-1]), dim=1)
    late_BT = torch.where(batch.turn_BT == before_BT, batch.turn_BT, -1)
    return fast((trunk, expert, head, replace(batch, turn_BT=late_BT)), tier, num_steps, loss)


def same(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("loss", ["lk", "eda"])
@pytest.mark.parametrize("num_steps", [1, 2, 3])
@pytest.mark.parametrize("tier", ["low-rank", "expert", "expert-fc", "expert-lora", "eda", "full"])
def test_gradients_are_those_of_the_definition_and_the_trunk_has_none(
    case: Case, tier: str, num_steps: int, loss: str
) -> None:
    ours = fast(case, tier, num_steps, loss)
    assert all(gradient.abs().sum() > 0 for gradient in ours.values())
    same(ours, plain(case, tier, num_steps, loss))
    assert all(parameter.grad is None for parameter in (*case[0].parameters(), *case[1].parameters()))


@pytest.mark.parametrize("wrong", [without_the_prompts_keys, one_position_late])
def test_a_step_that_drops_keys_or_positions_would_not_pass(
    case: Case, wrong: Callable[[Case, str, int, str], Gradients]
) -> None:
    with pytest.raises(AssertionError):
        same(wrong(case, "expert-lora", 1, "lk"), plain(case, "expert-lora", 1, "lk"))
