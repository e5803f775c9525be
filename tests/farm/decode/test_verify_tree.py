# B rows (a drawn tree and the decisions about its nodes), M nodes, V vocabulary
"""Exact enumeration in fp64: over all drawn trees and all accept / refuse outcomes, the output is the target's.

Invariants I2 and I4: the same enumeration must show a clear error for each known-bad verifier.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import farm.decode.verify_tree as verify_tree_module
from farm.decode.tree import FIRST_CHILD, NEXT_CHILD, Tree, TreeShape, depths_of, static_parents
from farm.decode.verify import verify_greedy, verify_sampled
from farm.decode.verify_tree import (
    AfterNodes,
    Drawn,
    TreePath,
    _descend,
    _Offers,
    verify_tree_greedy,
    verify_tree_sampled,
)

Prefix = tuple[int, ...]


@dataclass(frozen=True)
class World:
    """p and q after every prefix shorter than `length` tokens; `raw` is p before temperature."""

    p: dict[Prefix, Tensor]
    q: dict[Prefix, Tensor]
    raw: dict[Prefix, Tensor]
    vocab: int
    length: int


def random_world(seed: int, vocab: int, length: int, *, sharp: float = 2.0, zeros: bool = False) -> World:
    generator = torch.Generator().manual_seed(seed)
    world = World({}, {}, {}, vocab, length)
    for size in range(length):
        for prefix in itertools.product(range(vocab), repeat=size):
            logits = torch.randn(2, vocab, generator=generator, dtype=torch.float64) * sharp
            p, q = (logits[0] / 0.5).softmax(0), logits[1].softmax(0)
            if zeros:
                p = torch.where(p < 0.2 * p.max(), 0.0, p)
                q = torch.where(q < 0.2 * q.max(), 0.0, q)
                p, q = p / p.sum(), q / q.sum()
            world.p[prefix], world.q[prefix], world.raw[prefix] = p, q, logits[0].softmax(0)
    return world


def constant_world(p: list[float], q: list[float], length: int) -> World:
    left, right = (torch.tensor(x, dtype=torch.float64) for x in (p, q))
    blank = random_world(0, len(p), length)
    return replace(blank, p=dict.fromkeys(blank.p, left), q=dict.fromkeys(blank.p, right))


@dataclass(frozen=True)
class Drawings:
    """Trees of one shape with the probability of drawing each, and the prefix of every node."""

    tree: Tree
    weight_B: Tensor
    prefixes: list[list[Prefix]]


def drawings(world: World, parents: Prefix, kind: str) -> Drawings:
    """Every way to draw siblings without replacement, or the one tree of the likeliest siblings."""
    found: list[tuple[list[int], list[bool], float]] = []

    def grow(tokens: list[int], real: list[bool], weight: float) -> None:
        node = len(tokens)
        if node == len(parents):
            found.append((tokens, real, weight))
            return
        siblings = [tokens[i] for i in range(1, node) if parents[i] == parents[node] and real[i]]
        left_V = world.q[prefix_of(parents, tokens, parents[node])].clone()
        left_V[siblings] = 0.0
        if not real[parents[node]] or left_V.sum() == 0:
            grow([*tokens, 0], [*real, False], weight)
        elif kind == "top-k":
            grow([*tokens, int(left_V.argmax())], [*real, True], weight)
        else:
            for token in left_V.nonzero().flatten().tolist():
                share = float(left_V[token] / left_V.sum())
                grow([*tokens, token], [*real, True], weight * share)

    grow([0], [True], 1.0)
    size = (len(found), -1)
    tree = Tree(
        tokens_BM=torch.tensor([tokens for tokens, _, _ in found]),
        parents_BM=torch.tensor(parents).expand(size),
        depths_BM=torch.tensor(depths_of(parents)).expand(size),
        real_BM=torch.tensor([real for _, real, _ in found]),
    )
    nodes = range(len(parents))
    prefixes = [[prefix_of(parents, tokens, node) for node in nodes] for tokens, _, _ in found]
    return Drawings(tree, torch.tensor([weight for _, _, weight in found], dtype=torch.float64), prefixes)


def prefix_of(parents: Prefix, tokens: list[int], node: int) -> Prefix:
    return () if node == 0 else (*prefix_of(parents, tokens, parents[node]), tokens[node])


Spoil = Callable[[Drawings, World], Drawings]


@dataclass(frozen=True)
class Outcomes:
    """Every drawn tree (`tree_B`) with every way to accept and refuse its nodes, and the probability of each."""

    path: TreePath
    follow_BV: Tensor
    weight_B: Tensor
    tree_B: Tensor


class Noted(_Offers):
    """Takes note of the probability that each offered node is accepted with; nan where none was offered."""

    def __init__(self, tree: Tree, p_after: AfterNodes, drawn: Drawn | None, accept_BM: Tensor) -> None:
        super().__init__(tree, p_after, drawn, accept_BM)
        self.ratio_BM = torch.full_like(tree.tokens_BM, torch.nan, dtype=torch.float64)

    def choose(self, node_B: Tensor, children_BW: Tensor) -> Tensor:
        self._children_BW = children_BW
        return super().choose(node_B, children_BW)

    def _ratio(self, token_B: Tensor, offered_B: Tensor, p_BV: Tensor, offer_BV: Tensor) -> Tensor:
        ratio_B = super()._ratio(token_B, offered_B, p_BV, offer_BV)
        said_BW = self._tree.tokens_BM.gather(1, self._children_BW)  # siblings have different tokens
        is_it_BW = (said_BW == token_B[:, None]) & (self._children_BW > 0)
        node_B = (self._children_BW * is_it_BW).sum(dim=1)
        rows_B = offered_B.nonzero().squeeze(1)
        self.ratio_BM[rows_B, node_B[rows_B]] = ratio_B[rows_B]
        return ratio_B


def outcomes(drawn: Drawings, p_DMV: Tensor, q_DMV: Tensor, kind: str) -> Outcomes:
    """The real walk, its uniform numbers set so that a node is accepted or refused whatever its odds."""
    num, num_nodes = drawn.tree.tokens_BM.shape
    decisions = [(False, *one) for one in itertools.product((False, True), repeat=num_nodes - 1)]
    tree_B = torch.arange(num).repeat_interleave(len(decisions))
    take_BM = torch.tensor(decisions).repeat(num, 1)
    parts = (drawn.tree.tokens_BM, drawn.tree.parents_BM, drawn.tree.depths_BM, drawn.tree.real_BM)

    def after(table_DMV: Tensor) -> AfterNodes:
        return lambda node_B: table_DMV[tree_B, node_B]

    how = Drawn(after(q_DMV), torch.ones(len(take_BM), dtype=torch.bool)) if kind == "sampled" else None
    accept_BM = torch.where(take_BM, -1.0, 2.0).double()
    offers = Noted(tree := Tree(*(part[tree_B] for part in parts)), after(p_DMV), how, accept_BM)
    path = _descend(tree, offers.choose)
    odds_BM = torch.where(take_BM, offers.ratio_BM, 1 - offers.ratio_BM)
    # Of a node that was not offered one of the two decisions counts.
    odds_BM = torch.where(offers.ratio_BM.isnan(), (~take_BM).double(), odds_BM)
    weight_B = drawn.weight_B[tree_B] * odds_BM[:, 1:].prod(dim=1)
    return Outcomes(path, offers.follow_BV, weight_B, tree_B)


def output_joint(
    world: World, parents: Prefix, kind: str, spoil: Spoil | None = None, raw: str = ""
) -> tuple[Tensor, Tensor]:
    """Joint distribution of the first `length` tokens, one round and then the target itself; and of the path's length.

    `raw` names the distribution that a known-bad verifier does not process: `q`, or that of the `bonus` at a leaf.
    """
    drawn = drawings(world, parents, kind)
    if spoil is not None:
        drawn = spoil(drawn, world)
    of_node = [
        world.raw if raw == "bonus" and node not in parents[1:] else world.p for node in range(len(parents))
    ]
    p_DMV = torch.stack(
        [torch.stack([p[x] for p, x in zip(of_node, row, strict=True)]) for row in drawn.prefixes]
    )
    q_DMV = torch.stack([torch.stack([world.q[x] for x in row]) for row in drawn.prefixes])
    if raw == "q":
        q_DMV = q_DMV.sqrt() / q_DMV.sqrt().sum(dim=-1, keepdim=True)
    found = outcomes(drawn, p_DMV, q_DMV, kind)
    path, follow_BV = found.path, found.follow_BV / found.follow_BV.sum(dim=-1, keepdim=True)
    joint = torch.zeros((world.vocab,) * world.length, dtype=torch.float64)
    lengths_L = torch.zeros(world.length, dtype=torch.float64)
    lengths_L.index_add_(0, path.num_accepted_B, found.weight_B)
    masses: dict[Prefix, Tensor] = {}
    for row in (found.weight_B > 0).nonzero().flatten().tolist():
        prefix = drawn.prefixes[int(found.tree_B[row])][int(path.nodes_BP[row, -1])]
        masses[prefix] = masses.get(prefix, 0.0) + found.weight_B[row] * follow_BV[row]
    for prefix, mass_V in masses.items():
        for token in range(world.vocab):
            _extend(joint, world, (*prefix, token), mass_V[token])
    return joint, lengths_L


def _extend(joint: Tensor, world: World, prefix: Prefix, probability: Tensor) -> None:
    if len(prefix) == world.length:
        joint[prefix] += probability
        return
    for token in range(world.vocab):
        _extend(joint, world, (*prefix, token), probability * world.p[prefix][token])


def error(world: World, parents: Prefix, kind: str, spoil: Spoil | None = None, raw: str = "") -> float:
    """Total variation between the output and the target's own joint distribution."""
    target = torch.zeros((world.vocab,) * world.length, dtype=torch.float64)
    _extend(target, world, (), torch.tensor(1.0, dtype=torch.float64))
    return float((output_joint(world, parents, kind, spoil, raw)[0] - target).abs().sum() / 2)


SHAPES: dict[str, tuple[int, Prefix]] = {  # vocabulary, parents
    "one child": (6, (0, 0)),
    "two children": (6, (0, 0, 0)),
    "three children": (5, (0, 0, 0, 0)),
    "four children": (5, (0, 0, 0, 0, 0)),
    "all tokens": (3, (0, 0, 0, 0)),
    "chain": (3, (0, 0, 1, 2)),
    "two levels": (3, (0, 0, 0, 1, 1, 2)),
    "three levels": (3, (0, 0, 0, 1, 1, 3)),
}
KINDS = pytest.mark.parametrize("kind", ["top-k", "sampled"])


def length_of(parents: Prefix) -> int:
    return max(depths_of(parents)) + 1


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    kind=st.sampled_from(["top-k", "sampled"]),
    seed=st.integers(0, 10_000),
    sharp=st.sampled_from([0.0, 0.5, 2.0, 30.0]),
    zeros=st.booleans(),
)
@settings(max_examples=40)
def test_output_distribution_is_the_targets_exactly(
    shape: str, kind: str, seed: int, sharp: float, zeros: bool
) -> None:
    """With `zeros` a node often has more children than its draft has tokens."""
    vocab, parents = SHAPES[shape]
    world = random_world(seed, vocab, length_of(parents), sharp=sharp, zeros=zeros)
    assert error(world, parents, kind) < 1e-12


HALF, ONE_HOT = [0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]
EDGES = {
    "p equals q": ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),
    "disjoint": (HALF, [0.0, 0.0, 0.3, 0.7]),
    "p one-hot": (ONE_HOT, [0.4, 0.3, 0.2, 0.1]),
    "q one-hot": ([0.4, 0.3, 0.2, 0.1], ONE_HOT),
    "both one-hot, equal": (ONE_HOT, ONE_HOT),
    "both one-hot, disjoint": (ONE_HOT, [1.0, 0.0, 0.0, 0.0]),
    "zero residual": (HALF, HALF),
    "residual left by rounding": ([0.3, 0.3, 0.4, 0.0], [0.1 + 0.2, 0.3, 0.4, 0.0]),
}


@KINDS
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("parents", [(0, 0), (0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0, 0), (0, 0, 0, 1)])
def test_edges_of_p_and_q_are_exact(kind: str, edge: str, parents: Prefix) -> None:
    world = constant_world(*EDGES[edge], length_of(parents))
    assert error(world, parents, kind) < 1e-12


def unnormalised(p: Tensor, q: Tensor) -> Tensor:
    left = (p - q).clamp(min=0)
    return torch.where(left.sum(dim=-1, keepdim=True) > 0, left, p)


def resorted(drawn: Drawings, world: World) -> Drawings:
    """Siblings of the root, all leaves, in the order of their draft probability instead of that of drawing."""
    order_BM = world.q[()][drawn.tree.tokens_BM[:, 1:]].argsort(dim=1, descending=True) + 1
    order_BM = torch.cat((torch.zeros_like(order_BM[:, :1]), order_BM), dim=1)
    prefixes = [[row[i] for i in order] for row, order in zip(drawn.prefixes, order_BM.tolist(), strict=True)]
    tokens_BM = drawn.tree.tokens_BM.gather(1, order_BM)
    return Drawings(replace(drawn.tree, tokens_BM=tokens_BM), drawn.weight_B, prefixes)


def pruned_by_score(drawn: Drawings, world: World) -> Drawings:
    """Nodes whose drawn token the draft finds unlikely are left out."""
    kept_BM = drawn.tree.real_BM & (world.q[()][drawn.tree.tokens_BM] > 0.2)
    kept_BM[:, 0] = True
    return replace(drawn, tree=replace(drawn.tree, real_BM=kept_BM))


BAD: dict[str, tuple[str, Spoil | None, str, dict[str, Callable[..., Tensor]]]] = {
    "children sorted again": ("sampled", resorted, "", {}),
    "sampled tree pruned by score": ("sampled", pruned_by_score, "", {}),
    "raw q": ("sampled", None, "q", {}),
    "unprocessed bonus": ("sampled", None, "bonus", {}),
    "unprocessed bonus of point masses": ("top-k", None, "bonus", {}),
    "no residual": ("sampled", None, "", {"residual": lambda p, q: p}),
    "no residual of point masses": ("top-k", None, "", {"residual": lambda p, q: p}),
    "residual not renormalised": ("sampled", None, "", {"residual": unnormalised}),
    "drawn tokens stay in q": ("sampled", None, "", {"without": lambda q, token: q}),
}


@pytest.mark.parametrize("bad", BAD)
def test_enumeration_rejects_known_bad_verifiers(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, spoil, raw, patches = BAD[bad]
    world = random_world(2, 4, 2, sharp=1.0)
    assert error(world, (0, 0, 0, 0), kind) < 1e-12
    for name, replacement in patches.items():
        monkeypatch.setattr(verify_tree_module, name, replacement)
    assert error(world, (0, 0, 0, 0), kind, spoil, raw) > 1e-2


def test_a_top_k_node_is_passed_with_the_sum_of_its_childrens_probabilities() -> None:
    world = random_world(3, 5, 2, sharp=1.0)
    for width in range(1, 5):
        _, lengths = output_joint(world, (0,) * (width + 1), "top-k")
        best = world.q[()].topk(width).indices
        assert float(lengths[1]) == pytest.approx(float(world.p[()][best].sum()), abs=1e-12)


def test_the_first_sampled_child_is_accepted_with_the_overlap_of_p_and_q() -> None:
    world = random_world(3, 5, 2, sharp=1.0)
    _, lengths = output_joint(world, (0, 0), "sampled")
    assert float(lengths[1]) == pytest.approx(float(world.p[()].minimum(world.q[()]).sum()), abs=1e-12)
    wider = [float(output_joint(world, (0,) * (width + 1), "sampled")[1][1]) for width in (1, 2, 3)]
    assert wider == sorted(wider)


def chain_tree(last_B: Tensor, drafted_BK: Tensor) -> Tree:
    tokens_BM = torch.cat((last_B[:, None], drafted_BK), dim=1)
    depths_BM = torch.arange(tokens_BM.shape[1]).expand_as(tokens_BM)
    return Tree(tokens_BM, (depths_BM - 1).clamp(min=0), depths_BM, torch.ones_like(tokens_BM).bool())


def test_a_chain_and_a_tree_of_width_one_give_the_same_verdict() -> None:
    num, k, vocab = 200, 3, 7
    generator = torch.Generator().manual_seed(1)
    p = (torch.randn(num, k + 1, vocab, generator=generator) * 2).softmax(-1)
    q = (p[:, :k].log() + torch.randn(num, k, vocab, generator=generator)).softmax(-1)
    drafted = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(num, k)
    accept = torch.rand(num, k, generator=generator, dtype=torch.float64)
    next_u = torch.rand(num, generator=generator, dtype=torch.float64)
    lengths, rows = torch.full((num,), k), torch.arange(num)
    tree = chain_tree(torch.zeros(num, dtype=torch.int64), drafted)
    how = Drawn(lambda node: q[rows, node.clamp(max=k - 1)], torch.ones(num, dtype=torch.bool))
    accept_BM = torch.cat((torch.zeros(num, 1).double(), accept), dim=1)
    got = verify_tree_sampled(tree, lambda node: p[rows, node], how, accept_BM, next_u)
    expected = verify_sampled(drafted, p, q, accept, next_u, lengths)
    assert got.path.num_accepted_B.tolist() == expected.num_accepted_B.tolist()
    assert got.next_B.tolist() == expected.next_B.tolist()
    assert set(expected.num_accepted_B.tolist()) == {0, 1, 2, 3}
    best = torch.where(torch.rand(num, k + 1, generator=generator) < 0.7, p.argmax(-1), 0)
    best[:, :k] = torch.where(torch.rand(num, k, generator=generator) < 0.7, drafted, best[:, :k])
    got = verify_tree_greedy(tree, lambda node: best[rows, node])
    num_accepted = verify_greedy(drafted.tolist(), best.tolist(), lengths.tolist())
    assert got.path.num_accepted_B.tolist() == num_accepted
    assert got.next_B.tolist() == best[rows, num_accepted].tolist()


def two_rows() -> Tree:
    """Row 0: the root has children 5 and 6, of which 6 has 7; row 1: a chain 6, 7 and a padding node."""
    return Tree(
        tokens_BM=torch.tensor([[1, 5, 6, 7], [1, 6, 7, 0]]),
        parents_BM=torch.tensor([[0, 0, 0, 2], [0, 0, 1, 2]]),
        depths_BM=torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3]]),
        real_BM=torch.tensor([[True] * 4, [True, True, True, False]]),
    )


def test_greedy_follows_the_argmax_past_refused_siblings_and_never_into_padding() -> None:
    best = torch.tensor([[6, 9, 7, 4], [6, 7, 0, 3]])
    verdict = verify_tree_greedy(two_rows(), lambda node: best[torch.arange(2), node])
    assert verdict.path.nodes_BP.tolist() == [[0, 2, 3], [0, 1, 2]]
    assert verdict.path.num_accepted_B.tolist() == [2, 2]
    assert verdict.path.num_offered_B.tolist() == [2, 2]
    assert verdict.next_B.tolist() == [4, 0]


def test_what_was_offered_is_one_more_than_accepted_only_where_children_were_refused() -> None:
    best = torch.tensor([[5, 9, 7, 4], [6, 8, 0, 3]])
    verdict = verify_tree_greedy(two_rows(), lambda node: best[torch.arange(2), node])
    assert verdict.path.num_accepted_B.tolist() == [1, 1]
    assert verdict.path.num_offered_B.tolist() == [1, 2]
    assert verdict.path.nodes_BP.tolist() == [[0, 1], [0, 1]]


def test_a_node_sees_itself_and_its_ancestors_alone() -> None:
    seen = two_rows().ancestors().int().tolist()
    assert seen[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert seen[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert [two_rows().path_tokens(0, node) for node in range(4)] == [[], [5], [6], [6, 7]]


@given(width=st.integers(1, 5), depth=st.integers(1, 6), num_nodes=st.integers(1, 40))
@settings(max_examples=60)
def test_static_shapes_are_trees_within_their_sizes(width: int, depth: int, num_nodes: int) -> None:
    parents = static_parents(width, depth, num_nodes)
    room = sum(width**level for level in range(1, depth + 1))
    assert len(parents) == 1 + min(num_nodes, room)
    assert all(parent < node for node, parent in enumerate(parents) if node)
    assert max(parents[1:].count(node) for node in parents) <= width
    assert max(depths_of(parents)) <= depth
    depths = depths_of(parents)
    assert depths == sorted(depths)


@given(width=st.integers(1, 4), depth=st.integers(1, 4), num_nodes=st.integers(1, 30))
@settings(max_examples=40)
def test_a_static_shape_has_the_nodes_that_are_reached_most_often(
    width: int, depth: int, num_nodes: int
) -> None:
    """Of the whole tree, each child of a rank accepted as often as tree.py says."""
    whole, level = [1.0], [1.0]
    accepted = [FIRST_CHILD * NEXT_CHILD**rank for rank in range(width)]
    for _ in range(depth):
        level = [reach * share for reach in level for share in accepted]
        whole += level
    parents, found = static_parents(width, depth, num_nodes), [1.0]
    for node in range(1, len(parents)):
        found.append(found[parents[node]] * accepted[parents[1:node].count(parents[node])])
    assert sorted(found) == pytest.approx(sorted(whole)[-len(found) :])


@pytest.mark.parametrize("sizes", [{"kind": "beam"}, {"width": 0}, {"depth": 33}, {"num_nodes": 0}])
def test_a_shape_that_cannot_be_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="tree|at least"):
        TreeShape(**({"kind": "top-k", "width": 2, "depth": 3, "num_nodes": 8} | sizes))
