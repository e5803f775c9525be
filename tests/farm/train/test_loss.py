"""The losses against their definitions, and the positions they are taken over."""

import torch

from farm.data.features import Sample
from farm.train.batches import collate
from farm.train.loss import acceptance, smooth_l1, soft_cross_entropy


def test_soft_cross_entropy_is_the_definition_and_leaves_the_target_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    draft = torch.randn(5, 7, generator=generator, requires_grad=True)
    target = torch.randn(5, 7, generator=generator, requires_grad=True)
    loss = soft_cross_entropy(draft, target)
    p, q = target.softmax(-1), draft.softmax(-1)
    torch.testing.assert_close(loss, -(p * q.log()).sum())
    loss.backward()
    assert target.grad is None
    torch.testing.assert_close(draft.grad, (q - p).detach())  # p sums to 1, so the gradient is q - p


def test_smooth_l1_is_the_mean_over_the_hidden_size_summed_over_positions() -> None:
    predicted, hidden = torch.tensor([[0.5, 3.0]]), torch.tensor([[0.0, 0.0]])
    assert float(smooth_l1(predicted, hidden)) == (0.5 * 0.5**2 + (3.0 - 0.5)) / 2


def test_acceptance_is_one_minus_the_total_variation() -> None:
    draft, target = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    distance = (draft.softmax(-1) - target.softmax(-1)).abs().sum() / 2
    torch.testing.assert_close(acceptance(draft, target), 1 - distance)


def test_positions_start_at_the_last_prompt_token_and_end_where_a_true_hidden_state_does() -> None:
    """x_0..x_6 with a prompt of 3: index 2 predicts the distribution of x_4, the last trained index that of x_6."""
    sample = Sample(torch.arange(7), torch.zeros(6, 2), 3)
    longer = Sample(torch.arange(9), torch.zeros(8, 2), 1)
    batch = collate([sample, longer])
    assert batch.next_tokens_BT[0].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert batch.mask(0)[0].nonzero().flatten().tolist() == [2, 3, 4]
    assert batch.mask(1)[0].nonzero().flatten().tolist() == [2, 3]
    assert batch.mask(0)[1].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    whole = collate([sample, longer], prompt_tokens=True)
    assert whole.mask(0)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
