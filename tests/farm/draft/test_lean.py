"""The fused draft that decodes must be the draft that was trained."""

import pytest
import torch

from farm.draft.expert import Expert
from farm.draft.lean import LeanDraft, LeanExpert, LeanTrunk, Own
from farm.draft.model import Draft
from farm.layers.attention import causal_mask
from farm.layers.cache import Rows, SlotCache
from farm.layers.kernels import available
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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [(), (0,), (0, 2)])
def test_rows_with_experts_and_changes_of_their_own_are_as_each_alone(
    changed: tuple[int, ...], dtype: torch.dtype, threads: int
) -> None:
    """One pass of the kernels for a mixed batch: experts of several widths, a trunk that some rows change."""
    if available() is None:
        pytest.skip("no C++ compiler")
    _, first = tiny_pair(hidden=96)
    trunk = first.trunk.to(dtype)
    torch.manual_seed(1)
    experts = [Expert(96, width).to(dtype).requires_grad_(False) for width in (40, 16, 80)]
    deltas = {i: random_delta(trunk.config, {"fc": 3, "qkv": 2, "out": 4}, seed=i).to(dtype) for i in changed}
    which = tuple(list(deltas).index(i) if i in deltas else -1 for i in range(3))
    own = Own(tuple(map(LeanExpert.of, experts)), tuple(delta.lora() for delta in deltas.values()), which)
    embedded, hidden = torch.randn(2, 3, 4, 96, generator=torch.Generator().manual_seed(2)).to(dtype).unbind()

    def predicted(draft: LeanDraft, rows: slice) -> torch.Tensor:
        cache = SlotCache(1, 3, 12, (trunk.config.num_kv_heads, trunk.config.head_dim), dtype)
        said = []
        for start, end in ((0, 3), (3, 4)):
            window = cache.window(Rows([start] * len(range(3)[rows])), end - start)
            site = window.site(trunk.config.num_heads // trunk.config.num_kv_heads)
            parts = embedded[rows, start:end], hidden[rows, start:end]
            said.append(draft(*parts, window.positions_BT, site))
        return torch.cat(said, dim=1)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    mixed = predicted(LeanDraft(LeanTrunk.of(trunk), own), slice(0, 3))
    torch.set_num_threads(before)
    for row, expert in enumerate(experts):
        alone = predicted(LeanDraft.of(Draft(trunk, expert, deltas.get(row))), slice(row, row + 1))
        error = (mixed[row] - alone[0]).float().norm() / alone.float().norm()
        assert error < (1e-5 if dtype == torch.float32 else 0.03)
        others = [predicted(LeanDraft.of(Draft(trunk, other)), slice(row, row + 1)) for other in experts]
        assert sum(bool((mixed[row] - one[0]).abs().max() < 0.05) for one in others) < 3
