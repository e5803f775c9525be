"""Trees through the real engine: greedy identity, the distribution (I3) and its power (I4), caches, accounting."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import farm.decode.drafting as drafting_module
import farm.decode.propose_tree as propose_tree_module
import farm.decode.verify_tree as verify_tree_module
from farm.decode.adaedl import AdaEDL
from farm.decode.control import Fixed, Load
from farm.decode.controls import drafting_options
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.decode.tree import MOST_LEVELS, TreeShape
from farm.decode.tree_round import TreeProposal
from farm.draft.model import Draft
from farm.layers.cache import Rows
from farm.sections import ServeSettings, TreeSettings
from farm.target.forward import TargetForward
from tests.farm.decode.caches import fresh_caches
from tests.farm.decode.family import family
from tests.farm.decode.test_engine import NO_STOP, decode, prompts
from tests.farm.decode.test_lossless import DEPTH, PENALISED, SIZES, VOCAB, exact_joint, p_value
from tests.farm.models import tiny_model, tiny_pair

TOP_K, SAMPLED = TreeShape("top-k", 3, 3, 8), TreeShape("sampled", 3, 3, 8)
SHAPES = pytest.mark.parametrize("tree", [TOP_K, SAMPLED], ids=["top-k", "sampled"])
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.6, "logit_bias": ((7, 2.0), (9, -3.0)),
}  # fmt: skip


@given(
    seed=st.integers(0, 1000),
    num=st.integers(1, 8),
    num_slots=st.integers(1, 5),
    kind=st.sampled_from(["top-k", "sampled"]),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 14)),
    limit=st.integers(1, 20),
    pruned=st.booleans(),
    penalised=st.booleans(),
)
@settings(max_examples=25)
def test_greedy_trees_emit_the_tokens_of_plain_decoding(  # noqa: PLR0913 - what is drawn
    seed: int,
    num: int,
    num_slots: int,
    kind: Any,
    sizes: tuple[int, int, int],
    limit: int,
    pruned: bool,
    penalised: bool,
) -> None:
    """Whatever the draft, the shape, the slots, joins and leaves, stops and the context limit in a block."""
    target, draft = tiny_pair(seed=seed % 7)
    requests = [
        Request(
            str(i),
            ids,
            SamplingParams(max_new_tokens=limit + i, **(PENALTIES if penalised and i % 2 else {})),
        )
        for i, ids in enumerate(prompts(num, seed))
    ]
    options = {"stop_ids": frozenset({3, 17}), "max_length": 20, "num_slots": num_slots}
    draft.trunk.vocabulary_C = torch.arange(0, 32, 2) if pruned else None
    plain = decode(target, None, requests, **options)
    fast = decode(target, draft, requests, tree=TreeShape(kind, *sizes), **options)
    assert [done.tokens for done in fast] == [done.tokens for done in plain]
    assert [done.finish_reason for done in fast] == [done.finish_reason for done in plain]


@SHAPES
def test_a_draft_that_is_always_right_commits_every_level(tree: TreeShape) -> None:
    """A bias that drowns everything else makes target and draft agree: depth + 1 tokens a round."""
    target, draft = tiny_pair()
    params = SamplingParams(max_new_tokens=25, logit_bias=((7, 1e3),))
    requests = [Request(str(i), ids, params) for i, ids in enumerate(prompts(4, 1))]
    plain, fast = decode(target, None, requests), decode(target, draft, requests, tree=tree)
    assert [done.tokens for done in fast] == [done.tokens for done in plain]
    assert all(done.stats.tau == 4.0 for done in fast)


def test_a_wider_tree_accepts_more() -> None:
    """A tree of 20 nodes against its own best chain of the same depth."""
    target, draft = tiny_pair(seed=1)
    requests = [
        Request(str(i), ids, SamplingParams(max_new_tokens=40)) for i, ids in enumerate(prompts(6, 2))
    ]

    def accepted(tree: TreeShape) -> float:
        engine = Engine([Route(target, NO_STOP, draft)], num_slots=3, max_length=64, k=3, tree=tree)
        engine.run(requests)
        return sum(engine.stats.survival)

    assert accepted(TreeShape("top-k", 12, 3, 60)) > accepted(TreeShape("top-k", 1, 3, 3)) + 0.1


def hot_requests(num: int, **options: Any) -> list[Request]:
    params = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 12} | options
    ids = prompts(num, 3, vocab=10)
    return [Request(str(i), one, SamplingParams(**params, seed=i)) for i, one in enumerate(ids)]


def exact_pair() -> tuple[TargetForward, Draft]:
    """In fp64, so that batch shapes cannot round differently; flat, so that an unrelated draft is often accepted."""
    model = tiny_model(vocab=10).double()
    model.lm_head.weight.mul_(0.1)
    return TargetForward.of(model), tiny_pair(vocab=10)[1].double()


@pytest.mark.parametrize("options", [{}, PENALTIES, {"temperature": 0.0}], ids=["hot", "penalised", "greedy"])
def test_a_sampled_tree_of_width_one_is_a_chain(options: dict[str, Any]) -> None:
    """Token for token: the same numbers are used for the same purpose.

    Up to 12 of 15 tokens: near its end a chain is cut to the room that is left, a tree is drafted whole.
    """
    target, draft = exact_pair()
    requests = hot_requests(6, **options, max_new_tokens=15)
    chains = rounds(Engine([Route(target, NO_STOP, draft)], num_slots=6, max_length=64, k=3), requests)
    shape = TreeShape("sampled", 1, 3, 3)
    trees = rounds(
        Engine([Route(target, NO_STOP, draft)], num_slots=6, max_length=64, k=3, tree=shape), requests
    )
    assert trees == chains
    accepted = [num for of_request in chains.values() for _, num in of_request if num is not None]
    assert options == {"temperature": 0.0} or sum(accepted) > 10


def rounds(engine: Engine, requests: list[Request]) -> dict[str, list[tuple[tuple[int, ...], int | None]]]:
    """Tokens and accepted ones of each request's rounds that begin before its 12th token."""
    found: dict[str, list[tuple[tuple[int, ...], int | None]]] = {one.id: [] for one in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            of_request = found[output.request_id]
            if sum(len(tokens) for tokens, _ in of_request) < 12:
                of_request.append((output.tokens, output.num_drafted))
    return found


@SHAPES
def test_neighbours_never_change_a_requests_tokens(tree: TreeShape) -> None:
    """Greedy and penalised rows among the sampled ones."""
    target, draft = exact_pair()
    requests = hot_requests(8)
    requests[1] = replace(requests[1], params=SamplingParams(max_new_tokens=12))
    requests[4] = replace(requests[4], params=replace(requests[4].params, **PENALTIES))
    together = decode(target, draft, requests, num_slots=5, tree=tree)
    alone = [decode(target, draft, [request], num_slots=1, tree=tree)[0] for request in requests]
    assert [done.tokens for done in together] == [done.tokens for done in alone]
    assert together[1].tokens == decode(target, None, [requests[1]])[0].tokens


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@SHAPES
def test_a_mixed_batch_gives_every_target_the_tokens_it_gives_alone(
    tree: TreeShape, temperature: float, tmp_path: Path
) -> None:
    """LoRAs beside their base, another checkpoint, and a target without a draft, whose trees have a root alone."""
    mixed, own = family(tmp_path)
    names = ["lora0", "full", "base", "plain", "lora1", "full", "lora0", "plain", "base"]
    params = [
        SamplingParams(temperature=temperature, seed=i, max_new_tokens=9 + i) for i in range(len(names))
    ]
    requests = [Request(str(i), ids, params[i], names[i]) for i, ids in enumerate(prompts(len(names), 4))]
    options: dict[str, Any] = {"max_length": 40, "k": 3, "tree": tree}
    engine = Engine(mixed, num_slots=5, **options)
    together = [done.tokens for done in engine.run(requests)]
    alone = [Engine([own[r.target]], num_slots=1, **options).run([r])[0].tokens for r in requests]
    assert together == alone
    assert engine.stats_of["plain"].tau == 1.0
    assert engine.stats_of["plain"].reached == []


@pytest.mark.parametrize(
    "tree", [TreeShape("top-k", 6, 3, 40), TreeShape("sampled", 6, 3, 40)], ids=["top-k", "sampled"]
)
def test_after_every_step_the_caches_equal_a_fresh_prefill(tree: TreeShape) -> None:
    """The target's, compacted, and the draft's, rebuilt from true hidden states."""
    target, draft = exact_pair()
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=3, max_length=64, k=3, tree=tree)
    drafting = engine.runner.drafting
    assert drafting is not None
    for request in hot_requests(5, max_new_tokens=14):
        engine.add(request)
    while engine.has_work:
        engine.step()
        for slot, sequence in enumerate(engine.scheduler.live):
            of_target, of_draft = fresh_caches(engine, target, sequence.tokens, drafting._read[slot])
            for buffer, expected in (
                (engine.runner.cache.buffer, of_target),
                (drafting._cache.buffer, of_draft),
            ):
                torch.testing.assert_close(
                    buffer[:, slot, :, : expected.shape[2]], expected, atol=1e-9, rtol=0
                )
    assert sum(engine.stats.accepted[1:]) > 5


@SHAPES
def test_captured_features_are_those_of_the_accepted_paths(tree: TreeShape) -> None:
    target, draft = exact_pair()
    requests = hot_requests(3)
    for request, done in zip(requests, decode(target, draft, requests, capture=True, tree=tree), strict=True):
        whole = torch.tensor([[*request.prompt_ids, *done.tokens[:-1]]])
        expected = target.forward(whole, Rows([0]), target.new_cache(1, 64))[0]
        assert done.features is not None
        torch.testing.assert_close(done.features, expected, atol=1e-9, rtol=0)


@SHAPES
def test_tau_is_one_plus_the_survivals_by_depth(tree: TreeShape) -> None:
    target, draft = exact_pair()
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=3, max_length=64, k=3, tree=tree)
    done = engine.run(hot_requests(6, max_new_tokens=40))
    cut = sum(one.stats.rounds for one in done) + sum(engine.stats.accepted) - engine.stats.emitted
    assert 0 <= cut <= len(done)  # only a request's last round is cut, by its limit
    assert engine.stats.tau == pytest.approx(1 + sum(engine.stats.survival), abs=0.2)
    assert engine.stats.survival == sorted(engine.stats.survival, reverse=True)
    assert all(
        accepted <= reached
        for accepted, reached in zip(engine.stats.accepted, engine.stats.reached, strict=True)
    )


def test_a_control_rests_a_tree_as_it_rests_a_chain() -> None:
    """Rounds without a tree pile up what the draft has to read; the tokens stay those of plain decoding."""
    target, draft = tiny_pair()

    class Rests(Fixed):
        rounds = 0

        def limit(self, load: Load) -> int:
            self.rounds += 1
            return self.length if self.rounds % 40 == 0 else 0

    requests = [
        Request(str(i), ids, SamplingParams(max_new_tokens=50)) for i, ids in enumerate(prompts(4, 2))
    ]
    fast = decode(target, draft, requests, tree=TOP_K, control=Rests(3))
    assert [done.tokens for done in fast] == [done.tokens for done in decode(target, None, requests)]
    assert 1.0 <= fast[0].stats.tau < 1.5


def test_a_control_that_reads_distributions_is_refused() -> None:
    target, draft = tiny_pair()
    with pytest.raises(ValueError, match="AdaEDL"):
        Engine(
            [Route(target, NO_STOP, draft)], num_slots=1, max_length=64, k=3, tree=TOP_K, control=AdaEDL(3)
        )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("tree-2x4", TreeShape("top-k", 2, 4, 8)),
        ("tree-4x5-12", TreeShape("top-k", 4, 5, 12)),
        ("tree-sampled-3x2", TreeShape("sampled", 3, 2, 6)),
        ("fixed-4", None),
        ("tree-4", None),
    ],
)
def test_a_tree_is_what_its_name_says(name: str, shape: TreeShape | None) -> None:
    assert TreeShape.named(name) == shape


def test_a_deployment_drafts_the_tree_of_its_settings() -> None:
    """The least and the deepest that a manifest may ask for are trees, too; a length of chains is refused by name."""
    settings = ServeSettings(
        control="fixed", tree=TreeSettings(kind="sampled", width=2, depth=MOST_LEVELS, nodes=4)
    )
    with pytest.raises(ValueError, match="depth"):
        TreeSettings(depth=MOST_LEVELS + 1)
    target, draft = tiny_pair()
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=1, max_length=64, **drafting_options(settings))
    assert engine.runner.tree == TreeShape("sampled", 2, MOST_LEVELS, 4)
    with pytest.raises(ValueError, match="max_drafted is for chains; with trees it can only be 0"):
        engine.add(Request("0", (1, 2), SamplingParams(max_drafted=2)))
    plain = settings.model_copy(update={"tree": None})
    assert drafting_options(plain)["tree"] is None


Small = tuple[Any, TargetForward, Draft]
NUM_SAMPLES, NUM_BAD_SAMPLES, NUM_PENALISED = 20_000, 10_000, 1_000
AT_ONE: dict[str, Any] = {"temperature": 1.0}
AT_HALF: dict[str, Any] = {"temperature": 0.5}
SMALL_TOP_K, SMALL_SAMPLED = TreeShape("top-k", 2, 2, 5), TreeShape("sampled", 3, 2, 6)
SMALL_SHAPES = pytest.mark.parametrize("tree", [SMALL_TOP_K, SMALL_SAMPLED], ids=["top-k", "sampled"])


@pytest.fixture(scope="module")
def small() -> Small:
    model = tiny_model(**SIZES)
    model.lm_head.weight.mul_(0.4)
    return model, TargetForward.of(model), tiny_pair(**SIZES)[1]


def sampled_counts(small: Small, tree: TreeShape, num: int, options: dict[str, Any] = AT_ONE) -> Tensor:
    """Counts of the first DEPTH answer tokens over `num` independent requests."""
    _, target, draft = small
    engine = Engine(
        [Route(target, NO_STOP, draft)], num_slots=num, max_length=8, k=2, tree=tree, prefill_tokens=2 * num
    )  # fmt: skip
    params = [SamplingParams(**options, seed=seed, max_new_tokens=DEPTH) for seed in range(num)]
    done = engine.run(Request(str(seed), (1, 2), one) for seed, one in enumerate(params))
    tokens = torch.tensor([completion.tokens for completion in done])
    cells = (tokens * VOCAB ** torch.arange(DEPTH - 1, -1, -1)).sum(dim=1)
    return torch.bincount(cells, minlength=VOCAB**DEPTH)


@SMALL_SHAPES
def test_tokens_of_a_tree_follow_the_targets_distribution(small: Small, tree: TreeShape) -> None:
    """False alarms: 1e-4; seeds are fixed."""
    assert p_value(sampled_counts(small, tree, NUM_SAMPLES), exact_joint(small[0], AT_ONE)) > 1e-4


@SMALL_SHAPES
def test_trees_of_a_pruned_draft_vocabulary_change_no_probability(small: Small, tree: TreeShape) -> None:
    """A family of three has two tokens."""
    model, target, _ = small
    draft = tiny_pair(**SIZES)[1]
    draft.trunk.vocabulary_C = torch.tensor([0, 2])
    counts = sampled_counts((model, target, draft), tree, NUM_BAD_SAMPLES, AT_HALF)
    assert p_value(counts, exact_joint(model, AT_HALF)) > 1e-4


@SMALL_SHAPES
def test_penalties_bias_and_min_p_follow_each_path(small: Small, tree: TreeShape) -> None:
    counts = sampled_counts(small, tree, NUM_PENALISED, PENALISED)
    assert p_value(counts, exact_joint(small[0], PENALISED)) > 1e-4
    assert p_value(counts, exact_joint(small[0], {"temperature": PENALISED["temperature"]})) < 1e-6


def raw_q(monkeypatch: pytest.MonkeyPatch) -> None:
    real = propose_tree_module.expand
    monkeypatch.setattr(propose_tree_module, "expand", lambda q, head: real(q.sqrt(), head))


def no_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_tree_module, "residual", lambda p, q: p)


def unprocessed_bonus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token forgets its temperature of 0.5."""
    real = verify_tree_module.draw
    monkeypatch.setattr(verify_tree_module, "draw", lambda p, u: real(p.sqrt(), u))


def pruned_by_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawn node that its draft finds unlikely is not verified."""

    def prune(proposal: TreeProposal) -> TreeProposal:
        tree, drawn = proposal.tree, proposal.drawn
        assert drawn is not None
        q = torch.stack([drawn.q_after(parent) for parent in tree.parents_BM.unbind(1)], dim=1)
        unlikely = q.gather(2, tree.tokens_BM[..., None]).squeeze(2) < 0.3
        unlikely[:, 0] = False
        kept = tree.real_BM & ~unlikely
        return replace(proposal, tree=replace(tree, real_BM=kept & kept.gather(1, tree.parents_BM)))

    spoil_proposals(monkeypatch, prune)


def children_sorted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Siblings are offered in the order of their probability; all of them are leaves."""

    def resort(proposal: TreeProposal) -> TreeProposal:
        tree, drawn = proposal.tree, proposal.drawn
        assert drawn is not None
        tokens = tree.tokens_BM[:, 1:]
        q = drawn.q_after(tree.parents_BM[:, 0]).gather(1, tokens)
        tokens = tokens.gather(1, q.argsort(dim=1, descending=True))
        return replace(
            proposal, tree=replace(tree, tokens_BM=torch.cat((tree.tokens_BM[:, :1], tokens), dim=1))
        )

    spoil_proposals(monkeypatch, resort)


def spoil_proposals(monkeypatch: pytest.MonkeyPatch, change: Callable[[TreeProposal], TreeProposal]) -> None:
    real = drafting_module.propose_tree
    monkeypatch.setattr(drafting_module, "propose_tree", lambda *args: change(real(*args)))


@pytest.mark.parametrize(
    "spoil", [raw_q, no_residual, unprocessed_bonus, pruned_by_score, children_sorted_again]
)
def test_the_same_test_rejects_known_bad_decoders(
    small: Small, spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    tree = TreeShape("sampled", 3, 1, 3) if spoil is children_sorted_again else SMALL_SAMPLED
    counts = sampled_counts(small, tree, NUM_BAD_SAMPLES, AT_HALF)
    assert p_value(counts, exact_joint(small[0], AT_HALF)) < 1e-6
