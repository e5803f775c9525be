# B rows, M nodes, T tokens
"""Trees in a slot cache: every path of a tree is a chain to the forward, and the accepted one stays as a chain."""

from typing import Any

import pytest
import torch
from torch import Tensor

from farm.decode.propose import run_draft
from farm.decode.tree import Tree, depths_of
from farm.draft.lean import LeanDraft, LeanHead
from farm.draft.model import DraftHead
from farm.layers.cache import Branches, Rows, SlotCache
from farm.target.forward import TargetForward
from farm.target.reference import ReferenceForward
from tests.farm.models import TYPES, tiny_model, tiny_pair

Forward = TargetForward | ReferenceForward
PARENTS = ((0, 0, 0, 1, 1, 2, 3), (0, 0, 1, 1, 2, 3, 5), (0, 0, 0, 0, 3, 3, 5))
PREFIXES = ((4, 8, 15), (16, 23, 1, 9, 9), (2,))
ATOL = 1e-10


def trees() -> Tree:
    generator = torch.Generator().manual_seed(0)
    parents_BM = torch.tensor(PARENTS)
    tokens_BM = torch.randint(0, 32, parents_BM.shape, generator=generator)
    depths_BM = torch.tensor([depths_of(parents) for parents in PARENTS])
    return Tree(tokens_BM, parents_BM, depths_BM, torch.ones_like(tokens_BM).bool())


def path_of(tree: Tree, row: int, node: int) -> list[int]:
    path = [node]
    while path[0]:
        path.insert(0, int(tree.parents_BM[row, path[0]]))
    return path


def prefilled(target: Forward, num_slots: int, first: int) -> tuple[SlotCache, Rows]:
    """Three prefixes of different lengths in slots `first`..., and where their trees start."""
    cache = target.new_cache(num_slots, 24)
    width = max(map(len, PREFIXES))
    padded = torch.tensor([[*prefix, *[0] * (width - len(prefix))] for prefix in PREFIXES])
    target.forward(padded, Rows([0] * len(PREFIXES), first), cache)
    return cache, Rows([len(prefix) for prefix in PREFIXES], first)


def chain(target: Forward, tree: Tree, row: int, node: int) -> tuple[Tensor, SlotCache]:
    """Hidden states of a prefix and the path to a node behind it, by a prefill of their own."""
    cache = target.new_cache(1, 24)
    tokens = [*PREFIXES[row], *tree.tokens_BM[row, path_of(tree, row, node)].tolist()]
    return target.forward(torch.tensor([tokens]), Rows([0]), cache)[0], cache


@pytest.fixture(params=sorted(TYPES))
def target(request: pytest.FixtureRequest) -> TargetForward:
    return TargetForward.of(tiny_model(request.param).double())


def test_every_path_of_a_tree_has_the_hidden_states_of_its_chain(target: TargetForward) -> None:
    tree = trees()
    cache, rows = prefilled(target, 4, first=1)
    branches = Branches(tree.depths_BM, tree.ancestors())
    hidden_BMH = target.forward(tree.tokens_BM, Rows(rows.starts, 1, branches), cache)
    for row in range(len(PARENTS)):
        for node in range(len(PARENTS[0])):
            expected, _ = chain(target, tree, row, node)
            torch.testing.assert_close(hidden_BMH[row, node], expected[-1], atol=ATOL, rtol=0)


def test_a_tree_whose_nodes_see_their_siblings_is_told_apart_from_its_chains() -> None:
    """The test above would fail without the ancestor mask, or with positions by index."""
    target, tree = TargetForward.of(tiny_model().double()), trees()
    everything = torch.ones_like(tree.ancestors()).tril()
    by_index = torch.arange(7).expand_as(tree.depths_BM)
    for branches in (Branches(tree.depths_BM, everything), Branches(by_index, tree.ancestors())):
        cache, rows = prefilled(target, 3, first=0)
        hidden_BMH = target.forward(tree.tokens_BM, Rows(rows.starts, 0, branches), cache)
        expected, _ = chain(target, tree, 0, 6)
        assert float((hidden_BMH[0, 6] - expected[-1]).abs().max()) > 1e-3


@pytest.mark.parametrize("leaves", [(6, 4, 5), (5, 6, 6), (0, 1, 1)])
def test_after_keep_the_cache_is_that_of_a_fresh_prefill(
    target: TargetForward, leaves: tuple[int, ...]
) -> None:
    tree = trees()
    cache, rows = prefilled(target, 4, first=1)
    before = cache.buffer[:, 0].clone()
    target.forward(tree.tokens_BM, Rows(rows.starts, 1, Branches(tree.depths_BM, tree.ancestors())), cache)
    paths = [path_of(tree, row, leaf) for row, leaf in enumerate(leaves)]
    width = max(map(len, paths))
    cache.keep(rows, torch.tensor([[*path, *path[-1:] * (width - len(path))] for path in paths]))
    for row, path in enumerate(paths):
        length = len(PREFIXES[row]) + len(path)
        _, fresh = chain(target, tree, row, leaves[row])
        got, expected = cache.buffer[:, 1 + row, :, :length], fresh.buffer[:, 0, :, :length]
        torch.testing.assert_close(got, expected, atol=ATOL, rtol=0)
    assert torch.equal(cache.buffer[:, 0], before)


def test_a_draft_that_reads_a_tree_level_by_level_predicts_what_it_does_along_each_path() -> None:
    """A level's tokens see the nodes that earlier calls have written."""
    target, module = tiny_pair()
    draft, tree = LeanDraft.of(module.double()), trees()
    embedding = target.embedding.double()
    head: Any = LeanHead(DraftHead.of(embedding, embedding, None), target.head)
    inputs_BMH = torch.randn(3, 7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    shape = (draft.config.num_kv_heads, draft.config.head_dim)
    cache = SlotCache(1, 3, 24, shape, torch.float64)
    starts, seen = [3, 5, 1], tree.ancestors()
    prefix = torch.randint(0, 32, (3, 5), generator=torch.Generator().manual_seed(5))
    states = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    run_draft(draft, head, prefix, states, Rows([0, 0, 0]), cache)
    parts = []
    for a, b in ((0, 1), (1, 3), (3, 7)):
        rows = Rows(starts, 0, Branches(tree.depths_BM[:, a:b], seen[:, a:b, :b]))
        parts.append(run_draft(draft, head, tree.tokens_BM[:, a:b], inputs_BMH[:, a:b], rows, cache))
    got = torch.cat(parts, dim=1)
    for row, start in enumerate(starts):
        for node in range(7):
            path = path_of(tree, row, node)
            tokens = torch.cat((prefix[row, :start], tree.tokens_BM[row, path]))[None]
            hidden = torch.cat((states[row, :start], inputs_BMH[row, path]))[None]
            alone = SlotCache(1, 1, 24, shape, torch.float64)
            expected = run_draft(draft, head, tokens, hidden, Rows([0]), alone)[0, -1]
            torch.testing.assert_close(got[row, node], expected, atol=ATOL, rtol=0)
