"""The real engine: greedy identity, neighbours, joins and leaves, cache and accounting."""

import statistics
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farm.decode.chain import ChainProposal
from farm.decode.control import Fixed, Load, RoundResult
from farm.decode.controls import make_control
from farm.decode.engine import Completion, Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.decode.tree import TreeShape
from farm.draft.model import Draft
from farm.layers.cache import Rows
from farm.sections import LONGEST_CHAIN
from farm.target.forward import TargetForward
from tests.farm.decode.caches import fresh_caches
from tests.farm.models import tiny_model, tiny_pair

NO_STOP: frozenset[int] = frozenset()
CONTROLS = ["off", "fixed", "adaedl", "adaedl-published", "cost"]


def prompts(num: int, seed: int, vocab: int = 32) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (num,), generator=generator).tolist()
    return [tuple(torch.randint(0, vocab, (n,), generator=generator).tolist()) for n in lengths]


def decode(
    target: TargetForward, draft: Draft | None, requests: list[Request], **options: Any
) -> list[Completion]:
    chosen = {"num_slots": 3, "max_length": 64, "k": 3, "stop_ids": NO_STOP} | options
    stop_ids = chosen.pop("stop_ids")
    return Engine([Route(target, stop_ids, draft)], **chosen).run(requests)


@given(
    seed=st.integers(0, 1000),
    num=st.integers(1, 8),
    num_slots=st.integers(1, 8),
    k=st.integers(1, 5),
    limit=st.integers(1, 20),
    pruned=st.booleans(),
    control=st.sampled_from(CONTROLS),
    prefill_tokens=st.sampled_from([2, 5, 512]),
)
@settings(max_examples=30)
def test_greedy_speculation_emits_the_tokens_of_plain_decoding(  # noqa: PLR0913 - what is drawn
    seed: int, num: int, num_slots: int, k: int, limit: int, pruned: bool, control: str, prefill_tokens: int
) -> None:
    """Whatever the draft, its length, the slots, chunks, joins and leaves, stops and the context limit in a block."""
    target, draft = tiny_pair(seed=seed % 7)
    requests = [
        Request(str(i), ids, SamplingParams(max_new_tokens=limit + i))
        for i, ids in enumerate(prompts(num, seed))
    ]
    options = {"stop_ids": frozenset({3, 17}), "max_length": 20, "num_slots": num_slots}
    draft.trunk.vocabulary_C = torch.arange(0, 32, 2) if pruned else None
    plain = decode(target, None, requests, **options)
    options |= {"control": make_control(control, k), "prefill_tokens": prefill_tokens}
    fast = decode(target, draft, requests, k=k, **options)
    assert [done.tokens for done in fast] == [done.tokens for done in plain]
    assert [done.finish_reason for done in fast] == [done.finish_reason for done in plain]


class Slow(Fixed):
    """Thinks for a while before and after each round."""

    PAUSE_S = 0.02
    observes = True

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.seen: list[RoundResult] = []

    def limit(self, load: Load) -> int:
        time.sleep(self.PAUSE_S)
        return super().limit(load)

    def observe(self, result: RoundResult) -> None:
        self.seen.append(result)
        time.sleep(self.PAUSE_S)


def test_what_a_control_takes_is_a_part_of_its_rounds_and_no_drafting() -> None:
    """Else it would compare rounds that it makes slow with plain ones as if they were free."""
    target, draft = tiny_pair(seed=1)
    control = Slow(2)
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=1, max_length=64, k=2, control=control)
    engine.run([Request("a", (1, 2, 3), SamplingParams(max_new_tokens=24))])
    first, *later, _ = control.seen  # the last may draft nothing: nobody asks
    assert first.rest_s > Slow.PAUSE_S
    assert all(result.rest_s > 2 * Slow.PAUSE_S for result in later)
    assert all(result.catch_up_s < Slow.PAUSE_S for result in control.seen)
    assert engine.seconds.draft < Slow.PAUSE_S * len(control.seen)
    assert engine.seconds.host > 2 * Slow.PAUSE_S * len(later)


def test_a_control_hears_how_many_tokens_a_stop_has_left() -> None:
    target, draft = tiny_pair(seed=1)
    prompt, params = (1, 2, 3), SamplingParams(max_new_tokens=24)
    (plain,) = decode(target, None, [Request("a", prompt, params)])
    control = Slow(4)
    options: dict[str, Any] = {"num_slots": 1, "max_length": 64, "k": 4, "control": control}
    stops = frozenset({plain.tokens[9]})
    (done,) = Engine([Route(target, stops, draft)], **options).run([Request("a", prompt, params)])
    assert done.finish_reason == "stop"
    assert 1 + sum(result.tokens for result in control.seen) == len(done.tokens)


def test_long_accepted_runs_stay_lossless() -> None:
    """A target whose head knows one token is always drafted right: every round commits k + 1 tokens."""
    model = tiny_model()
    model.lm_head.weight.zero_()
    target, draft = TargetForward.of(model), tiny_pair()[1]
    requests = [
        Request(str(i), ids, SamplingParams(max_new_tokens=1 + 7 * 4)) for i, ids in enumerate(prompts(4, 1))
    ]
    plain, fast = decode(target, None, requests), decode(target, draft, requests)
    assert [done.tokens for done in fast] == [done.tokens for done in plain]
    assert fast[0].stats.survival[0] == 1.0


def test_what_observing_takes_is_shared_by_the_rounds_that_were_not_observed() -> None:
    """Charged to the observed ones alone, drafting would look slower than it is where few of its rounds are."""
    target, draft = tiny_pair(seed=1)

    class Seldom(Slow):
        rounds = 0

        def limit(self, load: Load) -> int:
            self.rounds += 1
            self.observes = self.rounds % 4 == 1
            return Fixed.limit(self, load)

    control = Seldom(2)
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=1, max_length=128, k=2, control=control)
    engine.run([Request("a", (1, 2, 3), SamplingParams(max_new_tokens=60))])
    _, *later = [result.rest_s for result in control.seen[:-1]]
    assert len(later) > 2
    assert statistics.median(later) < 0.6 * Slow.PAUSE_S
    assert min(later) > Slow.PAUSE_S / 4


def test_no_row_drafts_more_than_its_answer_has_room_for() -> None:
    """A round verifies one token more than it drafts: with three left two are drafted, with one none."""
    drafted: list[tuple[int, ...]] = []

    class Seen(Fixed):
        observes = True

        def observe(self, result: RoundResult) -> None:
            drafted.append(result.drafted)

    model = tiny_model()
    model.lm_head.weight.zero_()
    target, draft = TargetForward.of(model), tiny_pair()[1]
    requests = [Request(str(new), (1, 2), SamplingParams(max_new_tokens=1 + new)) for new in (1, 3, 4, 5, 9)]
    done = decode(target, draft, requests, num_slots=5, control=Seen(3))
    assert [len(one.tokens) for one in done] == [2, 4, 5, 6, 10]
    assert sorted(drafted[0]) == [0, 2, 3, 3, 3]
    assert sorted(drafted[1]) == [0, 3]
    assert drafted[2:] == [(0,)]


def test_neighbours_never_change_a_requests_tokens() -> None:
    """fp64, so that batch shapes cannot round differently; one request alone, and among seven others."""
    target = TargetForward.of(tiny_model().double())
    draft = tiny_pair()[1].double()
    requests = [
        Request(str(i), ids, SamplingParams(temperature=0.9, top_p=0.9, seed=i, max_new_tokens=12))
        for i, ids in enumerate(prompts(8, 3))
    ]
    together = decode(target, draft, requests, num_slots=5)
    alone = [decode(target, draft, [request], num_slots=1)[0] for request in requests]
    assert [done.tokens for done in together] == [done.tokens for done in alone]


def test_the_cache_after_rounds_equals_a_fresh_prefill() -> None:
    target, draft = tiny_pair()
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=3, max_length=64, k=3)
    for i, ids in enumerate(prompts(3, 5)):
        engine.add(Request(str(i), ids, SamplingParams(temperature=1.0, seed=i, max_new_tokens=40)))
    for _ in range(6):
        engine.step()
    for slot, sequence in enumerate(engine.scheduler.live):
        known = torch.tensor([sequence.tokens[:-1]])
        fresh = target.new_cache(1, 64)
        target.forward(known, Rows([0]), fresh)
        for kept, expected in zip(engine.runner.cache.buffer, fresh.buffer, strict=True):
            got = kept[slot, :, : known.shape[1]]
            torch.testing.assert_close(got, expected[0, :, : known.shape[1]], atol=1e-4, rtol=1e-4)


def test_captured_features_are_the_targets_hidden_states_of_every_processed_token() -> None:
    target, draft = tiny_pair()
    requests = [Request(str(i), ids, SamplingParams(max_new_tokens=9)) for i, ids in enumerate(prompts(3, 6))]
    for request, done in zip(requests, decode(target, draft, requests, capture=True), strict=True):
        whole = torch.tensor([[*request.prompt_ids, *done.tokens[:-1]]])
        expected = target.forward(whole, Rows([0]), target.new_cache(1, 64))[0]
        assert done.features is not None
        torch.testing.assert_close(done.features, expected, atol=1e-4, rtol=1e-4)


def test_tau_counts_emitted_tokens_and_leaves_the_prefills_own_token_out() -> None:
    target, draft = tiny_pair()
    requests = [
        Request(str(i), ids, SamplingParams(max_new_tokens=13)) for i, ids in enumerate(prompts(4, 7))
    ]
    for done in decode(target, draft, requests):
        assert done.stats.emitted == len(done.tokens) - 1
        assert done.stats.emitted <= done.stats.rounds + sum(done.stats.accepted)
    assert all(done.stats.tau == 1.0 for done in decode(target, None, requests))


def test_a_cancelled_request_frees_its_slot_and_leaves_the_others_unchanged() -> None:
    target, draft = tiny_pair()
    requests = [
        Request(str(i), ids, SamplingParams(max_new_tokens=20)) for i, ids in enumerate(prompts(3, 8))
    ]
    expected = decode(target, draft, requests)[2].tokens
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=3, max_length=64, k=3)
    for request in requests:
        engine.add(request)
    engine.step()
    engine.cancel("0")
    assert engine.num_live == 2
    finished = {}
    while engine.has_work:
        finished |= {out.request_id: out.completion for out in engine.step() if out.completion}
    assert set(finished) == {"1", "2"}
    assert finished["2"].tokens == expected


@pytest.mark.parametrize("ids", [(), tuple(range(64))])
def test_a_prompt_that_cannot_be_answered_is_refused(ids: tuple[int, ...]) -> None:
    target, _ = tiny_pair()
    engine = Engine([Route(target, NO_STOP)], num_slots=1, max_length=64, k=0)
    with pytest.raises(ValueError, match="prompt"):
        engine.add(Request("a", ids, SamplingParams()))


@pytest.mark.parametrize("stranger", [32, -1])
def test_a_prompt_with_an_id_outside_the_vocabulary_is_refused_and_the_others_go_on(stranger: int) -> None:
    target, _ = tiny_pair()
    engine = Engine([Route(target, NO_STOP)], num_slots=2, max_length=64, k=0)
    with pytest.raises(ValueError, match=f"request a: prompt token {stranger} .*32"):
        engine.add(Request("a", (1, stranger, 2), SamplingParams()))
    (done,) = engine.run([Request("b", (0, 31), SamplingParams(max_new_tokens=3))])
    assert len(done.tokens) == 3


def test_rows_at_the_context_limit_have_positions_for_the_longest_chain() -> None:
    """One row of a batch is at the last position while its neighbour has the whole chain verified."""
    target, draft = tiny_pair(max_position_embeddings=80)
    options: dict[str, Any] = {"num_slots": 2, "max_length": 80}
    with pytest.raises(ValueError, match=f"k.*at most {LONGEST_CHAIN}"):
        Engine([Route(target, NO_STOP, draft)], k=LONGEST_CHAIN + 1, **options)
    ids = (tuple(range(1, 31)) * 3)[:77]
    requests = [Request("long", ids, SamplingParams()), Request("short", (1, 2), SamplingParams())]
    plain = decode(target, None, requests, **options)
    fast = decode(target, draft, requests, k=LONGEST_CHAIN, **options)
    assert [done.tokens for done in fast] == [done.tokens for done in plain]


def test_proposals_of_a_pruned_draft_stay_inside_its_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = tiny_pair()
    draft.trunk.vocabulary_C = vocabulary = torch.tensor([2, 3, 5, 7, 11])
    seen: list[ChainProposal] = []
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=2, max_length=64, k=3)
    drafting = engine.runner.drafting
    assert drafting is not None
    real = drafting.propose

    def recording(*args: Any) -> ChainProposal:
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(drafting, "propose", recording)
    engine.run([Request("a", (1, 2, 3), SamplingParams(temperature=1.0, max_new_tokens=20))])
    assert torch.isin(torch.cat([proposal.tokens_BK.flatten() for proposal in seen]), vocabulary).all()
    outside = torch.ones(32, dtype=torch.bool).index_fill(0, vocabulary, False)
    assert all(float(proposal.q_BKV[..., outside].sum()) == 0.0 for proposal in seen)


def test_a_long_prompt_is_prefilled_in_chunks_while_the_others_decode() -> None:
    target, draft = tiny_pair()
    short = Request("short", (1, 2, 3), SamplingParams(max_new_tokens=20))
    long = Request("long", tuple(range(1, 31)), SamplingParams(max_new_tokens=8))
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=2, max_length=64, k=2, prefill_tokens=8)
    engine.add(short)
    engine.step()
    engine.add(long)
    emitted = [{out.request_id for out in engine.step()} for _ in range(4)]
    assert emitted[:3] == [{"short"}] * 3  # 30 prompt tokens in chunks of 8 take four steps
    assert emitted[3] == {"short", "long"}
    finished = {}
    while engine.has_work:
        finished |= {out.request_id: out.completion for out in engine.step() if out.completion}
    for request in (short, long):
        (alone,) = decode(target, None, [request], num_slots=1)
        assert finished[request.id].tokens == alone.tokens


@pytest.mark.parametrize("cancelled", ["long", "short"])
def test_a_request_cancelled_while_its_prompt_is_prefilled_leaves_the_others_unchanged(
    cancelled: str,
) -> None:
    target, draft = tiny_pair()
    requests = {
        "short": Request("short", (1, 2, 3), SamplingParams(max_new_tokens=20)),
        "long": Request("long", tuple(range(1, 31)), SamplingParams(max_new_tokens=8)),
    }
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=3, max_length=64, k=2, prefill_tokens=8)
    for request in requests.values():
        engine.add(request)
    engine.step()
    engine.cancel(cancelled)
    finished = {}
    while engine.has_work:
        finished |= {out.request_id: out.completion for out in engine.step() if out.completion}
    (kept,) = set(requests) - {cancelled}
    assert finished[kept].tokens == decode(target, None, [requests[kept]])[0].tokens


def test_a_draft_that_rested_for_long_has_read_all_when_it_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp64, three rows that are behind by different lengths, read in pieces: the cache is that of one forward."""
    monkeypatch.setattr("farm.decode.drafting.READ_TOKENS", 32)
    target, draft = TargetForward.of(tiny_model().double()), tiny_pair()[1].double()

    class Rests(Fixed):
        rounds = 0

        def limit(self, load: Load) -> int:
            self.rounds += 1
            return 0 if self.rounds <= 70 else super().limit(load)

    engine = Engine([Route(target, NO_STOP, draft)], num_slots=3, max_length=130, k=3, control=Rests(3))
    for i, ids in enumerate([(1, 2, 3), tuple(range(1, 31)), (4, 5)]):
        engine.add(Request(str(i), ids, SamplingParams(max_new_tokens=90)))
    drafting = engine.runner.drafting
    assert drafting is not None
    for _ in range(73):
        engine.step()
    for slot, sequence in enumerate(engine.scheduler.live):
        assert drafting._read[slot] > 70
        _, expected = fresh_caches(engine, target, sequence.tokens, drafting._read[slot])
        found = drafting._cache.buffer[:, slot, :, : expected.shape[2]]
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_a_draft_reads_nothing_while_its_target_is_decoded_plainly() -> None:
    target, draft = tiny_pair()
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=2, max_length=64, k=3, control=Fixed(0))
    engine.run([Request(str(i), (1, 2, 3), SamplingParams(max_new_tokens=20)) for i in range(3)])
    assert engine.runner.drafting is not None
    assert not engine.runner.drafting._cache.buffer.any()


def test_seconds_add_up_to_the_time_of_the_steps() -> None:
    target, draft = tiny_pair()
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=2, max_length=64, k=3)
    started = time.perf_counter()
    engine.run([Request(str(i), (1, 2, 3), SamplingParams(max_new_tokens=30)) for i in range(4)])
    total = time.perf_counter() - started
    parts = vars(engine.seconds)
    assert all(value > 0 for value in parts.values())
    assert 0.8 * total < sum(parts.values()) <= total


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_requests_own_draft_length_holds_for_it_alone_and_changes_no_token(temperature: float) -> None:
    target, draft = tiny_pair()
    lengths = (None, 0, 2, 1)
    requests = [
        Request(
            str(i),
            ids,
            SamplingParams(temperature=temperature, seed=i, max_new_tokens=30, max_drafted=length),
        )
        for i, (ids, length) in enumerate(zip(prompts(4, 5), lengths, strict=True))
    ]
    together = decode(target, draft, requests, num_slots=4)
    assert [done.tokens for done in together] == [decode(target, draft, [r])[0].tokens for r in requests]
    assert [len(done.stats.reached) for done in together] == [3, 0, 2, 1]
    assert together[1].stats.ended == {"undrafted": 29, "stopped": 0, "rejected": 0, "accepted": 0}


def test_a_tree_is_drafted_whole_or_not_at_all() -> None:
    target, draft = tiny_pair()
    tree = TreeShape("top-k", width=2, depth=2, num_nodes=4)
    engine = Engine([Route(target, NO_STOP, draft)], num_slots=1, max_length=64, k=3, tree=tree)
    with pytest.raises(ValueError, match="max_drafted"):
        engine.add(Request("0", (1, 2), SamplingParams(max_drafted=1)))
    done = engine.run([Request("1", (1, 2), SamplingParams(max_new_tokens=9, max_drafted=0))])
    assert done[0].stats.reached == []
