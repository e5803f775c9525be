"""The fused draft that decodes must be the draft that was trained."""

import pytest
import torch

from farm.draft.lean import LeanDraft, LeanTrunk
from farm.draft.model import Draft
from farm.layers.attention import causal_mask
from farm.layers.cache import Rows, SlotCache
from tests.farm.models import random_delta, tiny_pair


@pytest.mark.parametrize("changed", [False, True])
def test_the_fused_draft_predicts_what_the_module_predicts(changed: bool) -> None:
    draft = tiny_pair()[1].double()
    if changed:
        draft.delta = random_delta(draft.config, {"fc": 3, "qkv": 2, "out": 1}, seed=4).double()
    generator = torch.Generator().manual_seed(0)
    embedded, hidden = torch.randn(2, 3, 9, 32, generator=generator, dtype=torch.float64)
    positions = torch.arange(9).expand(3, 9) + torch.tensor([[0], [5], [2]])
    mask = causal_mask(torch.arange(9).expand(3, 9), 9, 2, torch.float64)
    expected = draft(embedded, hidden, positions, lambda kv: (*kv.transpose(1, 2).chunk(2, dim=1), mask))
    shape = (draft.config.num_kv_heads, draft.config.head_dim)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        lean = LeanDraft.of(draft.to(dtype))
        site = SlotCache(1, 3, 16, shape, dtype).window(Rows([0] * 3), 9).site(2)
        got = lean(embedded.to(dtype), hidden.to(dtype), positions, site)
        torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=0)
        draft.trunk.fused = None


def test_drafts_of_one_trunk_share_its_fused_weights() -> None:
    first, second = tiny_pair()[1], tiny_pair(seed=1)[1]
    fused = LeanTrunk.of(first.trunk)
    assert LeanTrunk.of(Draft(first.trunk, second.expert).trunk) is fused
