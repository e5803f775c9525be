"""Training must see exactly what serving computes; a plain re-run of attention over shifted predictions does not."""

import torch
from torch import Tensor

from farm.decode.propose import run_draft
from farm.draft.lean import LeanDraft
from farm.draft.model import DraftHead
from farm.layers.cache import Rows, SlotCache
from farm.target.forward import TargetForward
from farm.train.unroll import shift, unroll
from tests.farm.models import tiny_model, tiny_pair

NUM_STEPS, LENGTH = 4, 12


def serving_predictions(
    draft: LeanDraft, head: DraftHead, tokens_L: Tensor, hidden_TH: Tensor, index: int
) -> list[Tensor]:
    """What the decode engine's draft predicts in a round that begins at `index`, with the proposals forced."""
    shape = (draft.config.num_kv_heads, draft.config.head_dim)
    cache = SlotCache(1, 1, LENGTH + NUM_STEPS, shape, torch.float64)
    seen = run_draft(
        draft, head, tokens_L[None, 1 : index + 2], hidden_TH[None, : index + 1], Rows([0]), cache
    )
    predictions = [seen[0, -1]]
    for step in range(1, NUM_STEPS):
        token = tokens_L[None, index + 1 + step : index + 2 + step]
        out = run_draft(draft, head, token, predictions[-1][None, None], Rows([index + step]), cache)
        predictions.append(out[0, 0])
    return predictions


def test_unrolled_predictions_equal_the_engines_with_the_proposals_forced() -> None:
    """In fp64, where nothing but a different computation makes a difference."""
    target, draft = TargetForward.of(tiny_model().double()), tiny_pair()[1].double()
    head = DraftHead.of(target.embedding, target.head_weight, None)
    tokens_L = torch.randint(0, 32, (LENGTH + 1,), generator=torch.Generator().manual_seed(3))
    hidden_TH = target.forward(tokens_L[None, :LENGTH], Rows([0]), target.new_cache(1, LENGTH))[0]
    predicted = unroll(draft, head.embed(tokens_L[None, 1:]), hidden_TH[None], NUM_STEPS)
    for index in range(LENGTH - NUM_STEPS):
        for step, expected in enumerate(
            serving_predictions(LeanDraft.of(draft), head, tokens_L, hidden_TH, index)
        ):
            torch.testing.assert_close(predicted[step][0, index], expected, atol=1e-5, rtol=0)


def test_keys_made_from_predictions_at_other_indices_are_not_attended() -> None:
    """Changing the embedding that only index 5's second step reads must not move any other index's second step."""
    target, draft = tiny_pair()
    embedded = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(4))
    hidden = torch.randn(1, LENGTH, 32, generator=torch.Generator().manual_seed(5))
    before = unroll(draft, embedded, hidden, 2)[1]
    changed = embedded.clone()
    changed[:, 6] += 1.0
    after = unroll(draft, changed, hidden, 2)[1]
    moved = (before - after).abs().amax(dim=-1)[0] > 1e-6
    assert moved[5]
    assert not moved[:5].any()


def test_shift_reads_later_positions_and_pads_with_zeros() -> None:
    values = torch.arange(1.0, 5.0).view(1, 4, 1)
    assert shift(values, 2).flatten().tolist() == [3.0, 4.0, 0.0, 0.0]
