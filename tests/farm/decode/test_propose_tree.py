"""Drafted trees against the draft's own forward along every path, and against brute-force expansion."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from farm.decode.penalties import Penalties, Said
from farm.decode.propose import Pending, run_draft
from farm.decode.propose_tree import TreeProposal, draw_siblings, propose_tree
from farm.decode.sampling import SamplingBatch, SamplingParams, distribution
from farm.decode.tree import Tree, TreeShape, static_parents
from farm.decode.tree_reader import TreeReader
from farm.draft.lean import LeanDraft, LeanHead
from farm.draft.model import DraftHead
from farm.layers.cache import Rows, SlotCache
from farm.layers.dense import Dense
from tests.farm.decode.penalised import penalise
from tests.farm.models import tiny_pair

Path = tuple[int, ...]
READ = (5, 2, 3)  # tokens that the draft has read or is to read, a row each; the last is the root
UNREAD = (2, 1, 3)
VOCABULARY = torch.tensor([1, 2, 3, 5, 7, 11, 13, 30])


class World:
    """A draft in fp64 with three sequences of made-up hidden states, some of whose tokens are unread."""

    def __init__(self, vocabulary_C: Tensor | None = None) -> None:
        target, module = tiny_pair()
        module.trunk.vocabulary_C = vocabulary_C
        self.vocabulary_C = vocabulary_C
        self.draft = LeanDraft.of(module.double())
        embedding, weight = target.embedding.double(), target.head_weight.double()
        plain = DraftHead.of(embedding, weight, vocabulary_C)
        self.head: Any = LeanHead(plain, Dense.of(weight))
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(0, 32, (3, 5), generator=generator)
        self.hidden = torch.randn(3, 5, 32, dtype=torch.float64, generator=generator)

    def cache(self) -> SlotCache:
        shape = (self.draft.config.num_kv_heads, self.draft.config.head_dim)
        return SlotCache(1, 3, 64, shape, torch.float64)

    def pending(self, cache: SlotCache, limits: tuple[int, ...]) -> Pending:
        """What a draft that has read all before it, into `cache`, is to read now."""
        run_draft(self.draft, self.head, self.tokens, self.hidden, Rows([0] * 3), cache)
        starts = [read - unread for read, unread in zip(READ, UNREAD, strict=True)]
        tokens, hidden = self.tokens.clone(), self.hidden.clone()
        for row, start in enumerate(starts):
            tokens[row, : UNREAD[row]] = self.tokens[row, start : start + UNREAD[row]]
            hidden[row, : UNREAD[row]] = self.hidden[row, start : start + UNREAD[row]]
        return Pending(tokens[:, :3], hidden[:, :3], Rows(starts), UNREAD, limits)

    def reader(self, drafts: tuple[bool, ...] = (True,) * 3) -> TreeReader:
        cache = self.cache()
        return TreeReader(self.draft, self.head, self.pending(cache, drafts), cache)

    def logits(self, row: int, path: Path) -> Tensor:
        """The draft's logits after a path, read as a chain."""
        cache, read = self.cache(), READ[row]
        tokens, hidden = self.tokens[row : row + 1, :read], self.hidden[row : row + 1, :read]
        out = run_draft(self.draft, self.head, tokens, hidden, Rows([0]), cache)[:, -1:]
        for index, token in enumerate(path):
            out = run_draft(self.draft, self.head, torch.tensor([[token]]), out, Rows([read + index]), cache)
        return self.head.logits(out[:, 0])[0]


def batch_of(*params: SamplingParams, penalties: Penalties | None = None) -> SamplingBatch:
    return SamplingBatch.of(params, [0] * len(params), penalties)


def paths_of(tree: Tree, row: int) -> list[Path]:
    num = tree.tokens_BM.shape[1]
    return [tuple(tree.path_tokens(row, node)) for node in range(1, num) if bool(tree.real_BM[row, node])]


def brute_force(world: World, row: int, shape: TreeShape, penalise_path: Any = None) -> list[Path]:
    """EAGLE-2's tree node by node: expand the best `width` of a level, then take the best of all."""
    scores: dict[Path, float] = {(): 0.0}
    level: list[Path] = [()]
    for _ in range(shape.depth):
        grown: dict[Path, float] = {}
        for path in level:
            logits = world.logits(row, path)
            if penalise_path is not None:
                logits = penalise_path(logits, path)
            best, columns = logits.float().log_softmax(0).topk(min(shape.width, len(logits)))
            tokens = columns if world.vocabulary_C is None else world.vocabulary_C[columns]
            grown |= {
                (*path, token): scores[path] + value
                for token, value in zip(tokens.tolist(), best.tolist(), strict=True)
            }
        scores |= grown
        level = sorted(grown, key=lambda path: -grown[path])[: shape.width]
    del scores[()]
    return sorted(scores, key=lambda path: -scores[path])[: shape.num_nodes]


GREEDY, HOT = SamplingParams(), SamplingParams(temperature=0.8, top_k=4, seed=5)


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("sizes", [(1, 3, 3), (2, 3, 6), (3, 4, 20), (4, 2, 100), (3, 4, 5)])
def test_a_top_k_tree_is_the_one_of_brute_force(sizes: tuple[int, int, int], pruned: bool) -> None:
    world, shape = World(VOCABULARY if pruned else None), TreeShape("top-k", *sizes)
    proposal = propose_tree(world.reader(), shape, batch_of(GREEDY, HOT, GREEDY))
    assert proposal.drawn is None
    assert proposal.forwards == shape.depth
    for row in range(3):
        found = paths_of(proposal.tree, row)
        assert len(set(found)) == len(found)
        assert set(found) == set(brute_force(world, row, shape))


def test_parents_come_before_their_children_and_likelier_siblings_first() -> None:
    world = World()
    tree = propose_tree(world.reader(), TreeShape("top-k", 3, 3, 12), batch_of(*[GREEDY] * 3)).tree
    for row in range(3):
        parents = tree.parents_BM[row].tolist()
        assert all(parent < node for node, parent in enumerate(parents) if node)
        assert [len(path) for path in [(), *paths_of(tree, row)]] == tree.depths_BM[row].tolist()
        for node in range(len(parents)):
            children = [child for child, parent in enumerate(parents) if child and parent == node]
            q = world.logits(row, tuple(tree.path_tokens(row, node))).softmax(0)
            values = [float(q[tree.tokens_BM[row, child]]) for child in children]
            assert values == sorted(values, reverse=True)


def sampled(world: World, shape: TreeShape, batch: SamplingBatch) -> TreeProposal:
    return propose_tree(world.reader(), shape, batch)


@pytest.mark.parametrize("pruned", [False, True])
def test_q_of_a_sampled_node_is_the_drafts_after_its_own_path(pruned: bool) -> None:
    world, shape = World(VOCABULARY if pruned else None), TreeShape("sampled", 3, 3, 10)
    hot = [SamplingParams(temperature=t, top_p=0.95, seed=5) for t in (0.5, 1.0, 2.0)]
    proposal = sampled(world, shape, batch_of(*hot))
    tree, parents = proposal.tree, static_parents(3, 3, 10)
    assert proposal.drawn is not None
    assert tree.parents_BM.tolist() == [list(parents)] * 3
    for node in sorted(set(parents)):
        q_BV = proposal.drawn.q_after(torch.full((3,), node))
        assert q_BV.shape == (3, 32)
        for row in range(3):
            logits = world.logits(row, tuple(tree.path_tokens(row, node)))[None]
            expected = distribution(logits, batch_of(hot[row]))[0]
            got = q_BV[row] if world.vocabulary_C is None else q_BV[row, world.vocabulary_C]
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
            assert float(q_BV[row].sum()) == pytest.approx(1.0, abs=1e-5)
    for row in range(3):
        found = paths_of(tree, row)
        assert len(set(found)) == len(found)


def test_penalties_follow_each_nodes_own_path() -> None:
    """The draft's logits differ by hundreds, and so do these penalties: what a path says decides what follows it."""
    params = SamplingParams(temperature=60.0, repetition_penalty=1.5, frequency_penalty=-400.0, seed=1)
    said = Said([4, 9, 9], 1)
    world, batch = World(), batch_of(*[params] * 3, penalties=Penalties.of([params] * 3, [said] * 3))

    def after(logits: Tensor, path: Path) -> Tensor:
        return penalise(logits.float(), params, Said([*said.tokens, *path], 1), None)

    shape = TreeShape("top-k", 3, 3, 9)
    tree = propose_tree(world.reader(), shape, batch).tree
    plain = propose_tree(world.reader(), shape, batch_of(*[params] * 3)).tree
    proposal = sampled(world, TreeShape("sampled", 2, 3, 8), batch)
    assert proposal.drawn is not None
    for row in range(3):
        assert set(paths_of(tree, row)) == set(brute_force(world, row, shape, after))
        for node in sorted(set(static_parents(2, 3, 8))):
            path = tuple(proposal.tree.path_tokens(row, node))
            expected = distribution(after(world.logits(row, path), path)[None], batch_of(params))[0]
            torch.testing.assert_close(
                proposal.drawn.q_after(torch.full((3,), node))[row], expected, atol=1e-6, rtol=0
            )
    assert any(set(paths_of(tree, row)) != set(paths_of(plain, row)) for row in range(3))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_vocabulary_smaller_than_a_family_leaves_nodes_out(temperature: float) -> None:
    world = World(VOCABULARY[:2])
    params = [SamplingParams(temperature=temperature, seed=row) for row in range(3)]
    tree = sampled(world, TreeShape("sampled", 3, 2, 6), batch_of(*params)).tree
    for row in range(3):
        found = paths_of(tree, row)
        assert {path for path in found if len(path) == 1} == {(1,), (2,)}
        assert all(path[:-1] in {(), *found} for path in found)
    assert propose_tree(world.reader(), TreeShape("top-k", 3, 2, 20), batch_of(*params)).tree.tokens_BM.shape[
        1
    ] == (1 + 2 + 4)


def test_greedy_rows_of_a_sampled_tree_propose_their_likeliest_tokens() -> None:
    world, shape = World(), TreeShape("sampled", 3, 2, 6)
    mixed = sampled(world, shape, batch_of(GREEDY, HOT, GREEDY))
    alone = sampled(world, shape, batch_of(GREEDY, GREEDY, GREEDY))
    assert alone.drawn is None
    assert mixed.drawn is not None
    assert mixed.drawn.rows_B.tolist() == [False, True, False]
    for row in (0, 2):
        assert paths_of(mixed.tree, row) == paths_of(alone.tree, row)
        first = [path[0] for path in paths_of(alone.tree, row) if len(path) == 1]
        assert first == world.logits(row, ()).topk(3).indices.tolist()


@pytest.mark.parametrize("kind", ["top-k", "sampled"])
def test_a_row_without_a_draft_gets_a_root_alone(kind: Any) -> None:
    world, shape = World(), TreeShape(kind, 3, 2, 6)
    drafts = (True, False, True)
    some = propose_tree(world.reader(drafts), shape, batch_of(HOT, HOT, GREEDY)).tree
    every = propose_tree(world.reader(), shape, batch_of(HOT, HOT, GREEDY)).tree
    assert paths_of(some, 1) == []
    assert bool(some.real_BM[1, 0])
    assert [paths_of(some, row) for row in (0, 2)] == [paths_of(every, row) for row in (0, 2)]


def test_siblings_are_drawn_without_replacement_in_proportion_to_what_is_left() -> None:
    """Over a grid of both uniform numbers; the second must not be used for both draws."""
    q, num = torch.tensor([0.5, 0.3, 0.2, 0.0]), 200
    grid = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    u_BK = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1).view(-1, 2)
    columns, real = draw_siblings(q.expand(num * num, 4), u_BK)
    assert bool(real.all())
    for first in range(4):
        for second in range(4):
            share = float(((columns[:, 0] == first) & (columns[:, 1] == second)).double().mean())
            expected = 0.0 if first == second else float(q[first] * q[second] / (1 - q[first]))
            assert math.isclose(share, expected, abs_tol=3 / num)


def test_siblings_beyond_the_support_of_q_do_not_exist() -> None:
    q = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    columns, real = draw_siblings(q, torch.full((2, 3), 0.999, dtype=torch.float64))
    assert real.tolist() == [[True, False, False], [True, True, False]]
    assert columns[0, 0] == 1
    assert columns[1, :2].tolist() == [2, 0]
