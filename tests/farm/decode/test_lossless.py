"""Monte Carlo through the real engine (I3), the power of that test (I4), and acceptance accounting (I6)."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

import farm.decode.chain as chain_module
import farm.decode.propose as propose_module
import farm.decode.verify as verify_module
from farm.decode.controls import make_control
from farm.decode.engine import Engine, Request, Route
from farm.decode.penalties import Said
from farm.decode.sampling import SamplingBatch, SamplingParams, distribution, draw
from farm.decode.verify import Verdict
from farm.draft.model import Draft
from farm.target.forward import TargetForward
from tests.farm.decode.penalised import penalise
from tests.farm.models import tiny_model, tiny_pair

Options = dict[str, Any]
NUM_SAMPLES, VOCAB, DEPTH, BATCH = 200_000, 4, 4, 20_000
NUM_PENALISED = 10_000
KNOWN = [0, 2]  # a pruned draft vocabulary
NUM_BAD_SAMPLES = 60_000  # enough to reject every decoder below
SAMPLING: Options = {"temperature": 0.5, "top_p": 0.98, "top_k": 3}
PENALISED: Options = {
    "temperature": 0.8, "min_p": 0.1, "repetition_penalty": 1.3, "presence_penalty": 0.4,
    "frequency_penalty": 0.5, "logit_bias": ((2, 0.7),),
}  # fmt: skip
SIZES = {"vocab": VOCAB, "hidden": 16, "layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}

Small = tuple[Any, TargetForward, Draft, Tensor]


@pytest.fixture(scope="module")
def small() -> Small:
    model = tiny_model(**SIZES)
    model.lm_head.weight.mul_(0.4)
    return model, TargetForward.of(model), tiny_pair(**SIZES)[1], exact_joint(model)


@pytest.fixture(scope="module")
def pruned() -> Draft:
    """The draft of `small`, which knows two of four tokens."""
    draft = tiny_pair(**SIZES)[1]
    draft.trunk.vocabulary_C = torch.tensor(KNOWN)
    return draft


def sampled_counts(
    target: TargetForward, draft: Draft, num: int, control: str = "fixed-2", options: Options = SAMPLING
) -> Tensor:
    """Counts of the first DEPTH answer tokens over `num` independent requests."""
    decides = make_control(control, 2)
    counts = torch.zeros(VOCAB**DEPTH, dtype=torch.int64)
    for first in range(0, num, BATCH):
        engine = Engine(
            [Route(target, frozenset(), draft)],
            num_slots=BATCH,
            max_length=8,
            k=2,
            control=decides,
            prefill_tokens=2 * BATCH,
        )
        done = engine.run(request(seed, DEPTH, options) for seed in range(first, first + BATCH))
        tokens = torch.tensor([completion.tokens for completion in done])
        cells = (tokens * VOCAB ** torch.arange(DEPTH - 1, -1, -1)).sum(dim=1)
        counts += torch.bincount(cells, minlength=VOCAB**DEPTH)
    return counts


def request(seed: int, max_new_tokens: int, options: Options = SAMPLING) -> Request:
    params = SamplingParams(**options, seed=seed, max_new_tokens=max_new_tokens)
    return Request(str(seed), (1, 2), params)


def exact_joint(model: Any, options: Options = SAMPLING) -> Tensor:
    """The target's own joint distribution of the same tokens, its logits by `transformers` in fp64."""
    params = request(0, 1, options).params
    one = SamplingBatch.of([params], [0])
    model = model.double()

    def next_p(prefix: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            logits_V = model(torch.tensor([[1, 2, *prefix]])).logits[0, -1]
        return distribution(penalise(logits_V, params, Said([1, 2, *prefix], 2), None)[None], one)[0].double()

    joint = torch.zeros((VOCAB,) * DEPTH, dtype=torch.float64)
    for prefix in itertools.product(range(VOCAB), repeat=DEPTH - 1):
        before = [next_p(prefix[:i])[token] for i, token in enumerate(prefix)]
        joint[prefix] = torch.stack(before).prod() * next_p(prefix)
    model.float()
    return joint.flatten()


def p_value(counts: Tensor, joint: Tensor) -> float:
    """Of the chi-squared test, cells of expectation below 5 pooled; 0 when an impossible token was seen."""
    expected = joint * counts.sum()
    if counts[expected == 0].sum() > 0:
        return 0.0
    large = expected >= 5
    observed = torch.cat((counts[large], counts[~large].sum()[None])).double()
    expected = torch.cat((expected[large], expected[~large].sum()[None]))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(chi2.sf(float(statistic), len(expected) - 1))


def test_sampled_tokens_follow_the_targets_distribution(small: Small) -> None:
    """False alarms: 1e-4 by chi-squared, 1e-6 by total variation; seeds are fixed."""
    _, target, draft, joint = small
    counts = sampled_counts(target, draft, NUM_SAMPLES)
    assert p_value(counts, joint) > 1e-4
    distance = float((counts / NUM_SAMPLES - joint).abs().sum() / 2)
    bound = 0.5 * math.sqrt((VOCAB**DEPTH - 1) / NUM_SAMPLES) + math.sqrt(math.log(1e6) / (2 * NUM_SAMPLES))
    assert distance <= bound


def test_penalties_bias_and_min_p_follow_the_targets_distribution_with_them(small: Small) -> None:
    """Few rows a batch: penalties are worked out row by row."""
    model, target, draft, joint = small
    penalised = exact_joint(model, PENALISED)
    counts = sampled_counts(target, draft, NUM_PENALISED, options=PENALISED)
    assert p_value(counts, penalised) > 1e-4
    assert p_value(counts, joint) < 1e-6


@pytest.mark.parametrize("control", ["adaedl", "cost"])
def test_no_control_of_the_draft_length_changes_the_distribution(small: Small, control: str) -> None:
    _, target, draft, joint = small
    assert p_value(sampled_counts(target, draft, NUM_BAD_SAMPLES, control), joint) > 1e-4


def test_a_pruned_draft_vocabulary_changes_no_probability(small: Small, pruned: Draft) -> None:
    _, target, _, joint = small
    assert p_value(sampled_counts(target, pruned, BATCH), joint) > 1e-4


def raw_q(monkeypatch: pytest.MonkeyPatch) -> None:
    """The q that is reported is not the one that was drawn from."""
    real = propose_module.expand

    def flattened(q_BC: Tensor, head: Any) -> Tensor:
        flat = (q_BC + 0.05) ** 0.5
        return real(flat / flat.sum(dim=-1, keepdim=True), head)

    monkeypatch.setattr(propose_module, "expand", flattened)


def no_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rejection the token is drawn from p itself."""
    monkeypatch.setattr(verify_module, "next_distribution", lambda num, p, *_: p[torch.arange(len(num)), num])


def unprocessed_bonus(monkeypatch: pytest.MonkeyPatch) -> None:
    """After full acceptance the token forgets temperature and filters, as in the published EDA decoder."""
    real = verify_module.next_distribution

    def bonus(num: Tensor, p: Tensor, q: Tensor, lengths: Tensor) -> Tensor:
        full = (num == lengths)[:, None]
        return torch.where(full, p[torch.arange(len(num)), num] ** 0.5, real(num, p, q, lengths))

    monkeypatch.setattr(verify_module, "next_distribution", bonus)


def token_dependent_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drawn token that the draft finds unlikely is dropped unverified and drawn again from p."""
    real = chain_module.verify_sampled

    def verify(
        drafted: Tensor, p: Tensor, q: Tensor, accept: Tensor, following: Tensor, of: Tensor
    ) -> Verdict:
        if not drafted.shape[1]:
            return real(drafted, p, q, accept, following, of)
        unlikely = q.gather(-1, drafted[..., None]).squeeze(-1) < 0.4
        verdict = real(drafted, p, q, torch.where(unlikely, 2.0, accept), following, of)
        rows = torch.arange(len(drafted))
        at = verdict.num_accepted_B.clamp(max=drafted.shape[1] - 1)
        cut = (verdict.num_accepted_B < drafted.shape[1]) & unlikely[rows, at]
        return Verdict(verdict.num_accepted_B, torch.where(cut, draw(p[rows, at], following), verdict.next_B))

    monkeypatch.setattr(chain_module, "verify_sampled", verify)


def control_reads_what_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A position is drafted only if the token drawn for it was likely."""
    real = propose_module._Chain.extend

    def extend(self: Any, logits_BC: Tensor) -> bool:
        went = real(self, logits_BC)
        drawn = self._probabilities[-1].gather(1, self.tokens[-1][:, None]).squeeze(1).tolist()
        for row, probability in enumerate(drawn):
            if self._going[row] and probability < 0.4:
                self._going[row], self._lengths[row] = False, self._lengths[row] - 1
        return went

    monkeypatch.setattr(propose_module._Chain, "extend", extend)


def p_of_the_draft_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target is asked for what the draft knows, as where both are pruned alike."""
    real = chain_module.verify_sampled

    def verify(drafted: Tensor, p: Tensor, *rest: Tensor) -> Verdict:
        known = torch.zeros_like(p).index_copy(-1, torch.tensor(KNOWN), p[..., KNOWN])
        mass = known.sum(dim=-1, keepdim=True)
        return real(drafted, torch.where(mass > 0, known / mass, p), *rest)

    monkeypatch.setattr(chain_module, "verify_sampled", verify)


def test_the_same_test_rejects_a_target_that_is_pruned_like_its_draft(
    small: Small, pruned: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, target, _, joint = small
    p_of_the_draft_vocabulary(monkeypatch)
    assert p_value(sampled_counts(target, pruned, BATCH), joint) < 1e-6


BAD = [raw_q, no_residual, unprocessed_bonus, token_dependent_cut, control_reads_what_was_drawn]


@pytest.mark.parametrize("spoil", BAD)
def test_the_same_test_rejects_known_bad_decoders(
    small: Small, spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, target, draft, joint = small
    spoil(monkeypatch)
    # Rows go their own ways only under a control that looks at them.
    control = "adaedl" if spoil is control_reads_what_was_drawn else "fixed-2"
    assert p_value(sampled_counts(target, draft, NUM_BAD_SAMPLES, control), joint) < 1e-6


def test_acceptance_at_each_position_is_the_overlap_of_p_and_q(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 4 sigma of mean sum_v min(p, q) where the position is reached."""
    _, target, draft, _ = small
    overlaps: list[list[Tensor]] = [[], []]
    real = chain_module.verify_sampled

    def verify(
        drafted: Tensor, p: Tensor, q: Tensor, accept: Tensor, following: Tensor, of: Tensor
    ) -> Verdict:
        verdict = real(drafted, p, q, accept, following, of)
        for index in range(drafted.shape[1]):
            reached = (of > index) & (verdict.num_accepted_B >= index)
            overlaps[index].append(p[reached, index].minimum(q[reached, index]).sum(dim=-1))
        return verdict

    monkeypatch.setattr(chain_module, "verify_sampled", verify)
    engine = Engine(
        [Route(target, frozenset(), draft)], num_slots=BATCH, max_length=8, k=2, prefill_tokens=2 * BATCH
    )
    engine.run(request(seed, 4) for seed in range(BATCH))
    for found, alpha, reached in zip(overlaps, engine.stats.alpha, engine.stats.reached, strict=True):
        expected = float(torch.cat(found).mean())
        assert abs(alpha - expected) < 4 * math.sqrt(expected * (1 - expected) / reached)
