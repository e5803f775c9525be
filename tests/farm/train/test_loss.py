"""The losses against their definitions in float64, their gradients, and the positions they are taken over."""

import pytest
import torch
from torch import Tensor

from farm.data.features import Sample
from farm.train.batches import collate
from farm.train.loss import LOSSES, acceptance, forward_kl, graded, lk, lk_log, smooth_l1, soft_cross_entropy


def logits(seed: int, rows: int = 5, columns: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draft, target = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64) * 2
    return draft.requires_grad_(), target


def reference(name: str, draft: Tensor, target: Tensor) -> Tensor:
    """One position at a time, straight from the definitions."""
    out = []
    for z, t in zip(draft, target, strict=True):
        q, p = z.exp() / z.exp().sum(), t.exp() / t.exp().sum()
        kl = sum(p[c] * torch.log(p[c] / q[c]) for c in range(len(p)))
        alpha = sum(torch.minimum(p[c], q[c]) for c in range(len(p)))
        weight = torch.exp(-3 * alpha.detach())
        out.append(
            {
                "eda": -0.1 * (p * q.log()).sum(),
                "kl": kl,
                "tv": 0.5 * (p - q).abs().sum(),
                "lk": weight * kl + (1 - weight) * (1 - alpha),
                "lk-log": -torch.log(alpha),
            }[name]
        )
    return torch.stack(out)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_and_its_gradient_are_those_of_the_definition(name: str) -> None:
    draft, target = logits(1)
    ours, theirs = LOSSES[name](draft, target), reference(name, draft, target)
    torch.testing.assert_close(ours, theirs)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weights).sum(), draft),
        torch.autograd.grad((theirs * weights).sum(), draft),
    )


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gradient_in_closed_form_is_the_one_of_autograd(name: str, dtype: torch.dtype) -> None:
    draft, target = (values.detach().to(dtype) for values in logits(6, rows=40, columns=50))
    found = graded(name, draft, target)
    draft.requires_grad_()
    loss = LOSSES[name](draft, target)
    (expected,) = torch.autograd.grad(loss.sum(), draft)
    close = {"atol": 1e-9, "rtol": 1e-7} if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-2}
    torch.testing.assert_close(found.loss_M, loss.detach(), **close)
    torch.testing.assert_close(found.gradient_MC.to(dtype), expected, **close)
    torch.testing.assert_close(found.divergence_M, forward_kl(draft, target).detach(), **close)
    torch.testing.assert_close(found.alpha_M, acceptance(draft, target).detach(), **close)
    other = graded("kl" if name == "tv" else "tv", draft.detach(), target).gradient_MC
    assert (other.to(dtype) - expected).abs().max() > 1e-2  # another loss's gradient would be noticed


@pytest.mark.parametrize("name", ["eda", "kl", "tv", "lk-log"])  # lk holds its weight constant on purpose
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    draft, target = logits(2, rows=3)
    assert torch.autograd.gradcheck(lambda values: LOSSES[name](values, target), draft)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_target(name: str) -> None:
    draft, target = logits(3)
    target.requires_grad_()
    LOSSES[name](draft, target).sum().backward()
    assert target.grad is None


def test_a_divergence_in_the_wrong_direction_or_a_learned_weight_would_not_pass() -> None:
    draft, target = logits(4)
    p, q = target.softmax(-1), draft.softmax(-1)
    backwards = (q * (q.log() - p.log())).sum(-1)
    assert not torch.allclose(backwards, reference("kl", draft, target), rtol=1e-3)
    alpha = acceptance(draft, target)
    weight = torch.exp(-3 * alpha)  # not detached: pulls alpha down where KL is large
    wrong = torch.autograd.grad(
        (weight * forward_kl(draft, target) + (1 - weight) * (1 - alpha)).sum(), draft
    )[0]
    right = torch.autograd.grad(lk(draft, target).sum(), draft)[0]
    assert (wrong - right).abs().max() > 1e-2


def test_kl_is_cross_entropy_less_the_targets_entropy_and_has_its_gradient() -> None:
    draft, target = logits(5)
    p, q = target.softmax(-1), draft.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    torch.testing.assert_close(forward_kl(draft, target), soft_cross_entropy(draft, target) - entropy)
    torch.testing.assert_close(
        torch.autograd.grad(forward_kl(draft, target).sum(), draft)[0], (q - p).detach()
    )


def test_minus_log_alpha_is_finite_where_nothing_would_be_accepted() -> None:
    draft, target = torch.tensor([[200.0, -200.0]], requires_grad=True), torch.tensor([[-200.0, 200.0]])
    loss = lk_log(draft, target)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(draft.grad).all()


def test_smooth_l1_is_the_mean_over_the_hidden_size_of_each_position() -> None:
    predicted, hidden = torch.tensor([[0.5, 3.0], [0.0, 1.0]]), torch.zeros(2, 2)
    assert smooth_l1(predicted, hidden).tolist() == [(0.5 * 0.5**2 + (3.0 - 0.5)) / 2, 0.25]


def test_acceptance_is_one_minus_the_total_variation() -> None:
    draft, target = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    distance = (draft.softmax(-1) - target.softmax(-1)).abs().sum(-1) / 2
    torch.testing.assert_close(acceptance(draft, target), 1 - distance)


def test_positions_start_at_the_last_prompt_token_and_end_where_a_true_hidden_state_does() -> None:
    """x_0..x_6 with a prompt of 3: index 2 predicts the distribution of x_4, the last trained index that of x_6."""
    sample = Sample(torch.arange(7), torch.zeros(6, 2), 3)
    longer = Sample(torch.arange(9), torch.zeros(8, 2), 1)
    batch = collate([sample, longer], numbers=[4, 9])
    assert batch.next_tokens_BT[0].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert batch.mask(0)[0].nonzero().flatten().tolist() == [2, 3, 4]
    assert batch.mask(1)[0].nonzero().flatten().tolist() == [2, 3]
    assert batch.mask(0)[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    at = batch.where(1)
    assert at.sample_M.tolist() == [4, 4, 9, 9, 9, 9, 9, 9]
    assert at.index_M.tolist() == [2, 3, 0, 1, 2, 3, 4, 5]
    whole = collate([sample, longer], prompt_tokens=True)
    assert whole.mask(0)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]


def test_what_a_user_says_in_between_is_neither_drafted_nor_where_a_round_begins() -> None:
    """x_3..x_5 and x_8..x_11 are the target's: no position predicts x_3, x_6..x_8, and none goes from turn to turn."""
    sample = Sample(torch.arange(12), torch.zeros(11, 2), 3, turns=((3, 6), (8, 12)))
    batch = collate([sample])
    assert batch.mask(0)[0].nonzero().flatten().tolist() == [2, 3, 7, 8, 9]
    assert batch.mask(1)[0].nonzero().flatten().tolist() == [2, 7, 8]
    assert batch.mask(4)[0].nonzero().flatten().tolist() == []
    assert sample.num_said == 7
    assert collate([sample], prompt_tokens=True).mask(0)[0].sum() == 10
