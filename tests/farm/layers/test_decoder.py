"""A decoder in one call computes what its operators compute one by one, for chains and trees, targets and drafts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from farm.decode.chain import ChainProposal
from farm.decode.control import Fixed, Signal
from farm.decode.growth import Growing, Growth, Rule
from farm.decode.propose import ChainReader, FusedChainReader, Pending, chain_reader, propose
from farm.decode.sampling import SamplingBatch, SamplingParams
from farm.draft.lean import LeanDraft, LeanHead
from farm.draft.model import DraftHead
from farm.layers.cache import Branches, Rows, SlotCache
from farm.layers.kernels import available
from farm.layers.lora import Lora, LoraRows
from farm.target.forward import TargetForward
from tests.farm.models import tiny_model, tiny_pair

pytestmark = pytest.mark.skipif(available() is None, reason="no C++ compiler")
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
TREE = Branches(
    torch.tensor([[0, 1, 1, 2, 2]]).repeat(2, 1),
    torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]])
    .bool()
    .repeat(2, 1, 1),
)


def by_operators(forward: TargetForward) -> TargetForward:
    forward._decoder = None
    return forward


@pytest.mark.parametrize("branches", [None, TREE], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_in_one_call_is_the_target(kind: str, dtype: torch.dtype, branches: Branches | None) -> None:
    model = tiny_model(kind).to(dtype)
    whole, parts = TargetForward.of(model), by_operators(TargetForward.of(model))
    assert whole._decoder is not None
    caches, hidden = [], []
    for forward in (whole, parts):
        cache = forward.new_cache(4, 24)
        forward.forward(TOKENS, Rows([0, 0], first=1), cache)
        rows = Rows([5, 3], first=1, branches=branches)
        hidden.append(forward.forward(TOKENS.flip(1), rows, cache))
        caches.append(cache.buffer)
    torch.testing.assert_close(*hidden, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0.05)
    torch.testing.assert_close(*caches, atol=1e-4 if dtype == torch.float32 else 0.2, rtol=0.05)
    assert bool((caches[0][:, [0, 3]] == 0).all()), "other slots stay as they are"


def test_a_token_has_the_same_bits_alone_in_a_batch_and_in_a_verification() -> None:
    """So greedy speculation gives the very tokens of plain decoding, ties and near ties included."""
    forward = TargetForward.of(tiny_model())
    together, alone = forward.new_cache(2, 24), forward.new_cache(2, 24)
    both_BTH = forward.forward(TOKENS, Rows([0, 0]), together)
    for t in range(5):
        for row in range(2):
            one = forward.forward(TOKENS[row : row + 1, t : t + 1], Rows([t], first=row), alone)
            assert torch.equal(one[0, 0], both_BTH[row, t])
            assert torch.equal(forward.logits(one)[0, 0], forward.logits(both_BTH)[row, t])
    assert torch.equal(together.buffer, alone.buffer)


def readers(pruned: bool, limits: tuple[int, ...] = (3, 3), num_steps: int = 3) -> tuple[Any, Any]:
    """The same draft over the same pending tokens, three steps ahead at most: in one call each, and by operators."""
    target, draft = tiny_pair()
    vocabulary = torch.tensor([0, 3, 7, 11, 30]) if pruned else None
    head = LeanHead(DraftHead.of(target.embedding, target.head_weight, vocabulary), target.head)
    lean, config = LeanDraft.of(draft), draft.config
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    pending = Pending(TOKENS, hidden, Rows([4, 6], first=1), (5, 3), limits)
    made = []
    for make in (chain_reader, ChainReader):
        cache = SlotCache(1, 4, 40, (config.num_kv_heads, config.head_dim))
        cache.buffer[:, 1:3].normal_(generator=torch.Generator().manual_seed(1))
        made.append(make(lean, head, replace(pending), cache, num_steps))
    return tuple(made)  # type: ignore[return-value]


@pytest.mark.parametrize("pruned", [False, True])
def test_a_draft_foretells_in_one_call_what_its_operators_do(pruned: bool) -> None:
    fused, plain = readers(pruned)
    assert isinstance(fused, FusedChainReader)
    for _ in range(4):
        told, expected = fused.told, plain.told
        torch.testing.assert_close(told.logits_BC, expected.logits_BC, atol=1e-4, rtol=1e-4)
        best_B = fused.head.token_ids(expected.logits_BC.argmax(dim=-1))
        assert told.best_B.tolist() == best_B.tolist()
        if fused.forwards < 4:
            fused.read(told.best_B)
            plain.read(best_B)


def test_of_equal_logits_the_first_is_best() -> None:
    target, draft = tiny_pair()
    head = LeanHead(DraftHead.of(target.embedding, torch.ones(32, 32), torch.arange(4, 32)), target.head)
    cache = SlotCache(1, 1, 40, (draft.config.num_kv_heads, draft.config.head_dim))
    pending = Pending(TOKENS[:1], torch.randn(1, 5, 32), Rows([0]), (5,), (1,))
    told = chain_reader(LeanDraft.of(draft), head, pending, cache, 0).told
    assert told.best_B is not None
    assert told.best_B.tolist() == [4]


@pytest.mark.parametrize("sign", [1.0, -1.0])  # with one of them all logits are below 0
def test_what_pads_a_vocabulary_to_whole_vectors_is_no_choice(sign: float) -> None:
    """Seven columns; the zeros behind them are more than any logit below 0."""
    target, draft = tiny_pair()
    weight = sign * torch.arange(1.0, 33.0)[:, None].expand(32, 32)
    head = LeanHead(DraftHead.of(target.embedding, weight, torch.arange(3, 10)), target.head)
    cache = SlotCache(1, 1, 40, (draft.config.num_kv_heads, draft.config.head_dim))
    pending = Pending(TOKENS[:1], torch.ones(1, 5, 32), Rows([0]), (5,), (1,))
    told = chain_reader(LeanDraft.of(draft), head, pending, cache, 0).told
    assert told.best_B is not None
    assert told.best_B.tolist() == head.token_ids(told.logits_BC.argmax(dim=-1)).tolist()


def test_a_draft_that_says_no_numbers_proposes_known_tokens_and_ends_by_the_rule() -> None:
    """Which is asked for tables by a largest probability that is none."""
    fused, _ = readers(pruned=True)
    fused._pending.hidden_BTH.fill_(torch.nan)
    chain = fused.whole(None)
    assert chain.tokens_BK.shape == (2, 4)
    assert torch.isin(chain.tokens_BK, fused.head.vocabulary_C).all()
    rule = Rule([[0.1, 0.9, 0.9]] * 2, [[1.0] * 3] * 2, [0.5] * 3, [0.5] * 3)
    chain = fused.whole(Growth((3, 3), rule))
    assert (chain.forwards, chain.tokens_BK.shape) == (1, (2, 0))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("branches", [None, TREE], ids=["chain", "tree"])
def test_a_target_from_token_ids_to_its_choice_is_its_parts(kind: str, branches: Branches | None) -> None:
    forward = TargetForward.of(tiny_model(kind))
    caches = [forward.new_cache(4, 24) for _ in range(2)]
    for cache in caches:
        forward.forward(TOKENS, Rows([0, 0], first=1), cache)
    rows = Rows([5, 3], first=1, branches=branches)
    reading = forward.read(TOKENS.flip(1), rows, caches[0])
    hidden_BTH = forward.forward(TOKENS.flip(1), rows, caches[1])
    logits_BTV = forward.logits(hidden_BTH)
    assert torch.equal(reading.hidden_BTH, hidden_BTH)
    assert torch.equal(reading.logits_BTV, logits_BTV)
    assert reading.best_BT is not None
    assert torch.equal(reading.best_BT, logits_BTV.argmax(dim=-1))
    assert torch.equal(caches[0].buffer, caches[1].buffer)


def grown(limits: tuple[int, ...], growth: Growth | None) -> tuple[ChainProposal, ChainProposal]:
    """What one call drafts by a rule, and what its operators do that ask at every position."""

    class Asks(Fixed):
        signal: Signal = "peak"

        def __init__(self) -> None:
            super().__init__(3)
            self._growing = None if growth is None else Growing(growth)

        def keep(self, index: int, signal_B: Sequence[float]) -> list[bool]:
            keeps = self._growing is None or self._growing.keeps(index, signal_B)
            return [keeps] * len(signal_B)

        def more(self, index: int) -> bool:
            return self._growing is None or self._growing.grows(index)

    knows, asks = Asks(), Asks()
    knows.growth = growth
    if growth is None:
        knows.signal = "none"
    batch = SamplingBatch.of([SamplingParams()] * 2, [0, 0])
    fused, plain = readers(pruned=True, limits=limits, num_steps=2)
    return propose(fused, 3, knows, batch), propose(plain, 3, asks, batch)


@pytest.mark.parametrize("limits", [(3, 3), (1, 3), (0, 2)])
@pytest.mark.parametrize("above", [None, -1.0, 0.3, 0.6, 1.0, 1.4, 9.0])
def test_a_chain_in_one_call_grows_as_one_that_is_asked_for_token_by_token(
    limits: tuple[int, ...], above: float | None
) -> None:
    growth = None
    if above is not None:
        tables = [[0.2, 0.5, 0.7, 0.9]] * 2
        growth = Growth(limits, Rule(tables, [[0.9, 0.8, 0.7]] * 2, [above] * 3, [0.8 * above] * 3))
    whole, parts = grown(limits, growth)
    assert whole.lengths == parts.lengths
    assert whole.forwards == parts.forwards
    for row, length in enumerate(whole.lengths):
        assert whole.tokens_BK[row, :length].tolist() == parts.tokens_BK[row, :length].tolist()
    if growth is not None:
        torch.testing.assert_close(torch.tensor(whole.signals), torch.tensor(parts.signals))


def random_lora(forward: TargetForward, rank: int, seed: int) -> Lora:
    """Changes qkv, gate/up and down of every layer, and the attention's output of the first."""
    generator = torch.Generator().manual_seed(seed)

    def factors(num_inputs: int, num_outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
        down_XR = torch.randn(num_inputs, rank, generator=generator) / num_inputs**0.5
        return down_XR.to(forward.dtype), torch.randn(rank, num_outputs, generator=generator).to(
            forward.dtype
        )

    found: dict[Any, Any] = {}
    for index, layer in enumerate(forward.layers):
        gate_up = layer.gate_up.gate_up.num_outputs
        found[index, "qkv"] = factors(forward.hidden_size, layer.qkv.num_outputs)
        found[index, "gate_up"] = factors(forward.hidden_size, gate_up)
        # As of one fused of two projections: zero outside of its blocks, whose border is no vector's.
        found[index, "gate_up"][1][: rank // 2, gate_up // 2 + 3 :] = 0
        found[index, "gate_up"][1][rank // 2 :, : gate_up // 2 + 3] = 0
        found[index, "down"] = factors(gate_up // 2, forward.hidden_size)
        if index == 0:
            found[index, "out"] = factors(forward.num_heads * forward.head_dim, forward.hidden_size)
    return Lora.of(found)


@pytest.mark.parametrize("which", [(0,), (1, -1), (2, 0, 2, -1, 1)])
@pytest.mark.parametrize("rank", [3, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loras_by_row_in_one_call_are_those_of_the_operators(
    dtype: torch.dtype, rank: int, which: tuple[int, ...]
) -> None:
    model = tiny_model().to(dtype)
    whole, parts = TargetForward.of(model), by_operators(TargetForward.of(model))
    every = [random_lora(whole, rank + seed, seed) for seed in range(3)]  # of several ranks
    tokens, said = torch.arange(3 * len(which)).view(-1, 3) % 30, []
    for forward in (whole, parts):
        cache = forward.new_cache(6, 24)
        loras = LoraRows(every, which, 3, forward.device)
        forward.forward(tokens, Rows([0] * len(which), first=1), cache, loras)
        for start, num in ((3, 3), (6, 1)):
            loras = LoraRows(every, which, num, forward.device)
            rows = Rows([start] * len(which), first=1)
            said.append(forward.read(tokens[:, :num].flip(1), rows, cache, loras))
    for whole_said, parts_said in zip(said[:2], said[2:], strict=True):
        expected, tolerance = parts_said.logits_BTV, 1e-4 if dtype == torch.float32 else 0.05
        error = (whole_said.logits_BTV - expected).float().norm() / expected.float().norm()
        assert error < tolerance
    plain = whole.read(tokens, Rows([0] * len(which)), whole.new_cache(6, 24)).logits_BTV
    assert (plain - said[0].logits_BTV).abs().max() > 0.1, "a LoRA that changes nothing shows nothing"


@pytest.mark.parametrize("rank", [3, 8, 16, 24, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_with_a_lora_has_the_same_bits_alone_and_in_a_verification(
    dtype: torch.dtype, rank: int
) -> None:
    """Tokens of one sequence share a reading of its factors, some at a time."""
    forward = TargetForward.of(tiny_model(hidden=48).to(dtype))
    every, which = [random_lora(forward, rank, seed) for seed in range(2)], (1, -1, 0)
    tokens, num = torch.arange(18).view(3, 6), 6
    together, alone = forward.new_cache(3, 24), forward.new_cache(3, 24)
    loras = LoraRows(every, which, num, forward.device)
    whole = forward.read(tokens, Rows([0] * 3), together, loras).logits_BTV
    for t in range(num):
        loras = LoraRows(every, which, 1, forward.device)
        one = forward.read(tokens[:, t : t + 1], Rows([t] * 3), alone, loras).logits_BTV
        assert torch.equal(one[:, 0], whole[:, t])


@pytest.mark.parametrize("which", [(1, -1), (2, 0, 2, -1, 1)])
def test_loras_by_row_are_the_same_bits_on_any_number_of_threads(which: tuple[int, ...]) -> None:
    """Few rows are shared out by their outputs, more of them whole, with what each adds asked for ahead."""
    forward = TargetForward.of(tiny_model(hidden=96))
    every, said, before = [random_lora(forward, 8, seed) for seed in range(3)], [], torch.get_num_threads()
    tokens = torch.arange(2 * len(which)).view(-1, 2)
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        rows, loras = Rows([0] * len(which)), LoraRows(every, which, 2, forward.device)
        said.append(forward.read(tokens, rows, forward.new_cache(6, 24), loras).logits_BTV)
    torch.set_num_threads(before)
    assert all(torch.equal(one, said[0]) for one in said[1:])


@pytest.mark.parametrize("above", [0.5, 2.0, 3.5])
def test_threads_agree_on_how_far_a_chain_grows(above: float) -> None:
    """Each works it out for itself; one that went on alone would wait for ever. The work is too much for one thread."""
    target, draft = tiny_pair(hidden=96)
    head = LeanHead(DraftHead.of(target.embedding, target.head_weight, None), target.head)
    hidden = torch.randn(6, 2, 96, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(12).view(6, 2)
    tables = [[0.1 * bin for bin in range(1, 11)]] * 6
    growth = Growth((4,) * 6, Rule(tables, [[0.9] * 4] * 6, [above] * 4, [above] * 4))
    found, before = [], torch.get_num_threads()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        cache = SlotCache(1, 6, 40, (draft.config.num_kv_heads, draft.config.head_dim))
        pending = Pending(tokens, hidden, Rows([4] * 6), (2,) * 6, (4,) * 6)
        reader = chain_reader(LeanDraft.of(draft), head, pending, cache, 3)
        assert isinstance(reader, FusedChainReader)
        found.append(reader.whole(growth))
    torch.set_num_threads(before)
    for one in found[1:]:
        assert torch.equal(one.tokens_BK, found[0].tokens_BK)
        assert one.peaks == found[0].peaks
        assert one.forwards == found[0].forwards


def test_no_rows_are_no_work() -> None:
    """As of torch's products; a division by the number of tiles would end the process."""
    forward = TargetForward.of(tiny_model())
    assert forward.logits(torch.zeros(0, forward.hidden_size)).shape == (0, forward.vocab_size)
