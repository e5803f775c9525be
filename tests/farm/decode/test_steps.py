"""Steps of a few shapes give the tokens of steps in their own; they can be captured, and repeated from a capture."""

import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import farm.decode.steps as steps_module
from farm.decode.buckets import LEAST_CONTEXT, Buckets
from farm.decode.controls import make_control
from farm.decode.drafts import KEPT_TRUNKS
from farm.decode.engine import Completion, Engine, Request, Route
from farm.decode.graphs import Captured, Step, StepGraphs, Tensors
from farm.decode.proposal import ToVerify
from farm.decode.sampling import SamplingParams
from farm.decode.steps import EagerSteps
from farm.decode.tree import TreeShape
from farm.draft.model import Draft
from farm.layers.cache import Rows
from farm.target.forward import TargetForward
from tests.farm.decode.capture import NoHost, checked, recorded, with_capture
from tests.farm.decode.family import family
from tests.farm.decode.test_engine import NO_STOP, prompts
from tests.farm.models import random_delta, tiny_model, tiny_pair

TREE = TreeShape("top-k", 3, 2, 6)
CAPTURES = pytest.mark.parametrize("capture", [checked, recorded])
SHAPES = pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])


def exact_pair(seed: int = 0, kind: str = "llama") -> tuple[TargetForward, Draft]:
    """In fp64, so that padding cannot round differently."""
    return TargetForward.of(tiny_model(kind, seed=seed).double()), tiny_pair(seed=seed)[1].double()


def some(num: int, seed: int, targets: list[str] | None = None, **params: Any) -> list[Request]:
    """Requests of different lengths, every other one sampled."""
    named = targets or [""]
    return [
        Request(str(i), ids, SamplingParams(0.9 * (i % 2), seed=i, **({"max_new_tokens": 5 + 4 * i} | params)), name)
        for i, (ids, name) in enumerate(zip(prompts(num, seed), named * num, strict=False))
    ]  # fmt: skip


def tokens(done: list[Completion]) -> list[tuple[int, ...]]:
    return [one.tokens for one in done]


@given(
    seed=st.integers(0, 1000),
    num=st.integers(1, 8),
    num_slots=st.integers(1, 7),
    k=st.integers(1, 6),
    control=st.sampled_from(["off", "fixed", "adaedl-published"]),
    tree=st.booleans(),
    prefill_tokens=st.sampled_from([3, 512]),
    max_length=st.sampled_from([20, 150]),
)
@settings(max_examples=25)
def test_static_steps_emit_the_tokens_of_eager_ones(  # noqa: PLR0913 - what is drawn
    seed: int,
    num: int,
    num_slots: int,
    k: int,
    control: str,
    tree: bool,
    prefill_tokens: int,
    max_length: int,
) -> None:
    """Joins and leaves, a prompt prefilled in chunks in the top slot, the context limit inside a block.

    The controls are those that no clock decides: a sampled token depends on which round it falls in.
    """
    target, draft = exact_pair(seed % 7, ["llama", "qwen2", "qwen3"][seed % 3])
    requests = some(num, seed)
    options: dict[str, Any] = {
        "num_slots": num_slots, "max_length": max_length, "k": k, "prefill_tokens": prefill_tokens
    }  # fmt: skip

    def run(buckets: bool) -> list[tuple[int, ...]]:
        chosen = {"tree": TREE} if tree else {"control": make_control(control, k)}
        routes = [Route(target, frozenset({3, 17}), draft)]
        return tokens(Engine(routes, buckets=buckets, **options, **chosen).run(requests))

    assert run(True) == run(False)


@SHAPES
def test_a_mixed_batch_is_padded_group_by_group(tree: TreeShape | None, tmp_path: Path) -> None:
    """LoRAs, a second checkpoint, changes to the trunk, a target without a draft."""
    mixed, _ = family(tmp_path)
    requests = some(9, 4, ["lora0", "full", "base", "plain", "lora1"])
    options: dict[str, Any] = {"num_slots": 6, "max_length": 60, "k": 3, "tree": tree}
    eager = Engine(mixed, buckets=False, **options).run(requests)
    engine = Engine(mixed, buckets=True, **options)
    graphs = with_capture(engine, recorded)
    assert tokens(engine.run(requests)) == tokens(eager)
    assert len(graphs) > 3


def test_rows_of_one_lora_have_one_graph_however_often_they_are_put_together(tmp_path: Path) -> None:
    """The division of a batch into groups is remembered for some batches, and made anew for others."""
    mixed, _ = family(tmp_path)
    engine = Engine(mixed, buckets=True, num_slots=2, max_length=60, k=0)
    graphs, runner = with_capture(engine, recorded), engine.runner
    read = ToVerify(torch.ones(2, 1, dtype=torch.int64), None)
    for _ in range(4):
        (group,) = runner.routes.groups(("lora0", "lora0"))
        with torch.inference_mode():
            runner.steps.verify(group, read, [3, 4], runner.cache)
        runner.routes.groups.cache_clear()
    assert len(graphs) == 1


@CAPTURES
@SHAPES
def test_a_captured_step_serves_every_later_round_of_its_shape(capture: Any, tree: TreeShape | None) -> None:
    """Nothing in it waits for the host, and its replay gives the tokens of plain decoding and of eager steps."""
    target, draft = exact_pair()
    requests = some(7, 2, max_new_tokens=40)
    options: dict[str, Any] = {"num_slots": 5, "max_length": 64, "k": 3, "tree": tree}
    eager = Engine([Route(target, NO_STOP, draft)], **options).run(requests)
    engine = Engine([Route(target, NO_STOP, draft)], buckets=True, **options)
    graphs = with_capture(engine, capture)
    assert tokens(engine.run(requests)) == tokens(eager)
    assert 2 <= len(graphs) <= 16
    engine.drop("")
    assert len(graphs) == 0


def test_a_step_that_holds_a_value_of_the_host_gives_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known-bad: the starts of the capture are repeated in every replay."""
    real = steps_module._verify

    def frozen(*args: Any) -> Step:
        first: list[torch.Tensor] = []

        def step(tokens_BT: torch.Tensor, starts_B: torch.Tensor) -> Tensors:
            first.append(starts_B.clone().detach())
            return real(*args)(tokens_BT, first[0])

        return step

    target, draft = exact_pair()
    requests = some(4, 2, max_new_tokens=30)
    options: dict[str, Any] = {"num_slots": 4, "max_length": 64, "k": 2}
    eager = Engine([Route(target, NO_STOP, draft)], **options).run(requests)
    monkeypatch.setattr(steps_module, "_verify", frozen)
    engine = Engine([Route(target, NO_STOP, draft)], buckets=True, **options)
    with_capture(engine, checked)
    assert tokens(engine.run(requests)) != tokens(eager)


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x[: int(x.sum())],
        lambda x: torch.tensor(x.tolist()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x if bool((x > 0).any()) else -x,
        lambda x: x + torch.tensor([1, 2, 3]),
    ],
    ids=["item", "tolist", "boolean index", "nonzero", "branch", "host list"],
)
def test_what_a_graph_cannot_hold_is_refused(step: Any) -> None:
    ones = torch.ones(3, dtype=torch.int64)
    with NoHost(), pytest.raises(AssertionError, match="cannot be captured"):
        step(ones)


def test_an_eager_verification_cannot_be_captured() -> None:
    """Its starts come from the host."""
    target, _ = exact_pair()
    engine = Engine([Route(target, NO_STOP)], num_slots=2, max_length=64, k=0)
    (group,) = engine.runner.routes.groups(("", ""))
    read = ToVerify(torch.ones(2, 1, dtype=torch.int64), None)
    with NoHost(), pytest.raises(AssertionError, match="cannot be captured"):
        EagerSteps().verify(group, read, [3, 4], engine.runner.cache)


def test_padding_leaves_the_caches_of_other_slots_as_they_were() -> None:
    """Three of four slots decode; what the fourth keeps stays."""
    target, draft = exact_pair()
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=4, max_length=64, k=3, buckets=True)
    engine.runner.cache.buffer[:, 3] = 7.0
    for request in some(3, 1, max_new_tokens=30):
        engine.add(request)
    for _ in range(6):
        engine.step()
    assert engine.num_live == 3
    assert bool((engine.runner.cache.buffer[:, 3, :, :64] == 7.0).all())
    # The padding did work there, behind that.
    assert not bool((engine.runner.cache.buffer[:, 3] == 7.0).all())
    sequence = engine.scheduler.live[1].tokens
    fresh = target.new_cache(1, 64)
    target.forward(torch.tensor([sequence[:-1]]), Rows([0]), fresh)
    got = engine.runner.cache.buffer[:, 1, :, : len(sequence) - 1]
    torch.testing.assert_close(got, fresh.buffer[:, 0, :, : len(sequence) - 1], atol=1e-9, rtol=0)


@given(num_slots=st.integers(1, 40), max_drafted=st.integers(0, 20), capacity=st.integers(1, 5000))
@settings(max_examples=50)
def test_buckets_are_few_and_hold_what_they_are_for(num_slots: int, max_drafted: int, capacity: int) -> None:
    buckets = Buckets(num_slots, max_drafted)
    rows = {num: buckets.rows(num) for num in range(1, num_slots + 1)}
    lengths = {num: buckets.tokens(num) for num in range(1, max_drafted + 2)}
    contexts = {end: buckets.context(end, capacity) for end in range(1, capacity + 1)}
    for most, sizes in ((num_slots, rows), (max_drafted + 1, lengths), (capacity, contexts)):
        assert all(num <= size <= most for num, size in sizes.items())
        assert len(set(sizes.values())) <= most.bit_length() + 2
    assert min(contexts.values()) == min(capacity, LEAST_CONTEXT)
    assert buckets.rows(1, num_slots - 1) == 1


def test_a_capture_that_fails_is_said_once_and_steps_go_on_without(caplog: pytest.LogCaptureFixture) -> None:
    def fails(step: Step, inputs: Tensors) -> Captured:
        raise RuntimeError("operation not permitted when stream is capturing")

    target, draft = exact_pair()
    requests = some(4, 2)
    options: dict[str, Any] = {"num_slots": 4, "max_length": 64, "k": 2}
    eager = Engine([Route(target, NO_STOP, draft)], **options).run(requests)
    engine = Engine([Route(target, NO_STOP, draft)], buckets=True, **options)
    with_capture(engine, fails)
    with caplog.at_level(logging.ERROR):
        assert tokens(engine.run(requests)) == tokens(eager)
    assert len(caplog.records) == 1


def test_the_least_recently_used_graph_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.decode.graphs.MOST_GRAPHS", 2)
    graphs, made = StepGraphs(recorded), list[int]()

    def run(key: int) -> float:
        def make() -> Step:
            made.append(key)
            return lambda x: (x + key,)

        return float(graphs.run(key, make, (torch.ones(1),))[0])

    assert [run(key) for key in (1, 2, 3, 1, 2, 1, 3, 1)] == [2.0, 3.0, 4.0, 2.0, 3.0, 2.0, 4.0, 2.0]
    assert made == [1, 2, 3, 1, 2, 3]  # seen first, then captured once each
    run(2)  # was dropped for 3: it is as new
    assert made[-1] == 2
    assert len(graphs) == 2


def test_what_came_once_is_forgotten_when_many_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.decode.graphs.MOST_SEEN", 2)
    graphs = StepGraphs(recorded)
    for key in (1, 2, 3, 1):
        graphs.run(key, lambda: lambda x: (x,), (torch.ones(1),))
    assert len(graphs) == 0
    graphs.run(3, lambda: lambda x: (x,), (torch.ones(1),))
    assert len(graphs) == 1


@pytest.mark.gpu
@SHAPES
def test_cuda_graphs_give_the_tokens_of_eager_steps(tree: TreeShape | None) -> None:
    target = TargetForward.of(tiny_model().double().cuda())
    draft = tiny_pair()[1].double().cuda()
    requests = some(7, 2, max_new_tokens=40)
    options: dict[str, Any] = {"num_slots": 5, "max_length": 64, "k": 3, "tree": tree}
    eager = Engine([Route(target, NO_STOP, draft)], buckets=False, **options).run(requests)
    engine = Engine([Route(target, NO_STOP, draft)], **options)
    assert tokens(engine.run(requests)) == tokens(eager)
    assert len(engine.runner.steps.graphs) > 1


def test_captured_steps_keep_no_more_trunks_of_single_targets_than_drafts_do() -> None:
    """A replica has room for KEPT_TRUNKS of them; a target that comes back is captured anew."""
    target, first = exact_pair()
    routes = []
    for seed in range(KEPT_TRUNKS + 2):
        delta = random_delta(first.config, {"fc": 2, "qkv": 2}, seed).double()
        routes.append(Route(target, NO_STOP, Draft(first.trunk, first.expert, delta), target=f"t{seed}"))
    options: dict[str, Any] = {"num_slots": 2, "max_length": 64, "k": 3}
    engine = Engine(routes, buckets=True, **options)
    graphs, captured = with_capture(engine, recorded), []
    for route in [*routes, routes[0]]:
        requests = some(2, 5, [route.target], max_new_tokens=30)
        expected = tokens(Engine([route], buckets=False, **options).run(requests))
        assert tokens(engine.run(requests)) == expected
        captured.append(len(graphs))
    gc.collect()
    assert engine.runner.drafting is not None
    assert len(engine.runner.drafting._drafts._made) == KEPT_TRUNKS
    assert captured[1] > captured[0], "the steps of two trunks are kept side by side"
