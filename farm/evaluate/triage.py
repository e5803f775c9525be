"""Does adapting a target pay, in which tier, and after how many served tokens? Arithmetic only: no torch, no model.

    seconds a token now       s0 = prefill + min(plain, round / tau)
    after an adaptation       s1 = prefill + min(plain, round / tau'),  tau' = tau + r (tau_base - tau)
    paid after                n  = adaptation seconds / (s0 - s1) served tokens

`prefill` is the seconds of the prompts by token of their answers: no draft shortens them. `r` is the share of the lost
tau that a tier wins back. It starts as a guess that counts as GUESS_WEIGHT targets and is averaged with what past runs
of the store have measured on targets of the same kind. A tier that was never measured is not preferred to one that was:
its guess alone would decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from farm.config import OWN_DRAFT

Tier = Literal["low-rank", "expert", "full"]
Decision = Literal["skip", "low-rank", "expert", "full"]
Interval = tuple[float, float]

TIERS: tuple[Tier, ...] = ("low-rank", "expert", "full")
# EDA's tables have LoRA at 0.97 and the expert at 1.00 of what full training wins back; smaller models less of each.
GUESSED_RECOVERY: Mapping[Tier, float] = {"low-rank": 0.8, "expert": 0.85, "full": 0.9}
GUESS_WEIGHT = 2.0
# Of the expert's training seconds. Full: 5.1 h against 2.0 h as published for EDA; low-rank: the draft's operations
# without an expert's weight gradients.
TRAINING_SHARE: Mapping[Tier, float] = {"low-rank": 0.93, "expert": 1.0, "full": 2.55}
SERVED_TOKENS = 10_000_000  # that an adaptation has to pay within
LEAST_SPEEDUP = 1.05  # below it an adaptation is not worth its upkeep
LEAST_LOSS = 0.1  # of tau, below which a share of it says nothing


@dataclass(frozen=True)
class Past:
    """One adaptation that a store remembers."""

    target: str
    kind: str  # "full" or "lora"
    tier: Tier
    tau_before: float
    tau_after: float
    tau_base: float  # of the base draft on the base
    rows: int
    answers_s: float
    training_s: float
    plain_s: float | None = None  # seconds a token without speculation, batch 1
    round_s: float | None = None  # seconds of a round with the base draft, batch 1
    trained: int | None = None  # of `rows`, that were adapted on; None: all

    @property
    def recovery(self) -> float | None:
        """Share of the lost tau that was won back; None where next to nothing was lost."""
        lost = self.tau_base - self.tau_before
        return (self.tau_after - self.tau_before) / lost if lost > LEAST_LOSS else None


@dataclass(frozen=True)
class Seen:
    """What is known of a target as it is served now; seconds are those of the machine, at one batch size."""

    tau: float
    plain_s: float | None = None  # a token without speculation, after the prefill; None: not measured
    round_s: float | None = None  # a round with the draft
    tau_interval: Interval | None = None  # 95 %
    alpha: float | None = None  # accepted / reached drafted tokens
    alpha_interval: Interval | None = None
    prefill_s: float = 0.0  # of prompts, a served token; 0: not known, the other two may have it in them

    @classmethod
    def of_probe(cls, known: Mapping[str, Any]) -> Seen:
        """From what a probe has kept. Older ones do not tell prefills apart from decoding."""

        def interval(name: str) -> Interval | None:
            return None if known[name] is None else (known[name][0], known[name][1])

        return cls(
            tau=known["tau"],
            plain_s=known["plain_s"],
            round_s=known["round_s"],
            tau_interval=interval("tau_interval"),
            alpha=known["alpha"],
            alpha_interval=interval("alpha_interval"),
            prefill_s=known.get("prefill_s") or 0.0,
        )

    def token_s(self, tau: float) -> float:
        """Seconds a served token at a tau; decoding falls back to plain where that is faster. nan if not measured."""
        if self.plain_s is None or self.round_s is None:
            return math.nan
        return self.prefill_s + min(self.plain_s, self.round_s / tau)


@dataclass(frozen=True)
class Cost:
    """Seconds of adapting a target: its answers, and fitting an expert on them."""

    answers_s: float
    training_s: float

    def of(self, tier: Tier) -> float:
        return self.answers_s + self.training_s * TRAINING_SHARE[tier]


@dataclass(frozen=True)
class Offer:
    """What one tier is expected to bring."""

    tier: Tier
    tau: float
    speedup: float  # of a served token
    seconds: float  # of adapting
    saved_s: float  # a served token; nan if speeds are not known
    num_past: int  # adaptations in this tier that the store remembers

    @property
    def break_even(self) -> float:
        """Served tokens after which the adaptation has paid; inf if it never does."""
        return self.seconds / self.saved_s if self.saved_s > 0 else math.inf

    @property
    def gain_per_cost(self) -> float:
        """Seconds saved on a million served tokens, for each second of adapting."""
        return 1e6 * self.saved_s / self.seconds if self.seconds else math.inf

    def net_s(self, served_tokens: float) -> float:
        """Seconds won after that many tokens."""
        return served_tokens * self.saved_s - self.seconds


@dataclass(frozen=True)
class Verdict:
    """The decision for one target and what it rests on."""

    target: str
    decision: Decision
    reason: str
    seen: Seen
    tau_base: float
    offers: tuple[Offer, ...]

    @property
    def retention(self) -> float:
        return self.seen.tau / self.tau_base

    @property
    def offer(self) -> Offer:
        """Of the tier decided on; of the most gainful one where nothing is to be done."""
        chosen = [offer for offer in self.offers if offer.tier == self.decision]
        return chosen[0] if chosen else max(self.offers, key=lambda offer: offer.gain_per_cost)


def recovery(tier: Tier, kind: str, history: Sequence[Past]) -> float:
    """Expected share of the lost tau that a tier wins back on a target of this kind.

    What other tiers won back scales the guess, what the tier itself won back is averaged with it.
    """
    known = [(past.tier, past.recovery) for past in history if past.kind == kind]
    measured = [(seen, share) for seen, share in known if share is not None]
    ratios = [share / GUESSED_RECOVERY[seen] for seen, share in measured]
    scale = (GUESS_WEIGHT + sum(ratios)) / (GUESS_WEIGHT + len(ratios))
    own = [share for seen, share in measured if seen == tier]
    guess = min(1.0, GUESSED_RECOVERY[tier] * scale)
    return (guess * GUESS_WEIGHT + sum(own)) / (GUESS_WEIGHT + len(own))


def offers(seen: Seen, tau_base: float, cost: Cost, kind: str, history: Sequence[Past]) -> tuple[Offer, ...]:
    """One offer a tier, cheapest tier first."""
    now_s, lost = seen.token_s(seen.tau), max(0.0, tau_base - seen.tau)
    made = []
    for tier in TIERS:
        tau = seen.tau + recovery(tier, kind, history) * lost
        after_s = seen.token_s(tau)
        num_past = sum(past.tier == tier for past in history)
        made.append(Offer(tier, tau, now_s / after_s, cost.of(tier), now_s - after_s, num_past))
    return tuple(made)


def decide(
    target: str,
    seen: Seen,
    tau_base: float,
    made: tuple[Offer, ...],
    served_tokens: float = SERVED_TOKENS,
    skip_above: float | None = None,
) -> Verdict:
    """The tier that wins the most seconds over `served_tokens`, or `skip` where none is worth it.

    `skip_above` is a retention above which a target is left as it is, whatever it could win.
    """
    if skip_above is not None and seen.tau > skip_above * tau_base:
        reason = f"the base draft keeps {seen.tau / tau_base:.0%} of its tau, above {skip_above:.0%}"
        return Verdict(target, "skip", reason, seen, tau_base, made)
    known = [offer for offer in made if not math.isnan(offer.saved_s)]
    if not known:
        return Verdict(target, "skip", "no speed was measured", seen, tau_base, made)
    tried = [offer for offer in known if offer.num_past]
    best = max(tried or known, key=lambda offer: offer.net_s(served_tokens))
    if best.speedup < LEAST_SPEEDUP:
        reason = f"a served token would gain {best.speedup - 1:.0%}, below {LEAST_SPEEDUP - 1:.0%}"
        return Verdict(target, "skip", reason, seen, tau_base, made)
    if best.net_s(served_tokens) <= 0:
        reason = f"pays only after {count(best.break_even)} served tokens, above {count(served_tokens)}"
        return Verdict(target, "skip", reason, seen, tau_base, made)
    return Verdict(target, best.tier, "", seen, tau_base, made)


def line(verdict: Verdict) -> str:
    """The verdict as one line: what is expected, what it costs, when it has paid; for `full` also how to get it."""
    seen, offer = verdict.seen, verdict.offer
    start = f"{verdict.target}: {verdict.decision}: tau {measured(seen.tau, seen.tau_interval)}"
    if verdict.decision == "skip":
        return f"{start}; {verdict.reason}"
    expected = (
        f"{start} -> {offer.tau:.2f} expected, {offer.speedup:.2f} times the speed; adapting {offer.seconds:,.0f} s, "
        f"paid after {count(offer.break_even)} served tokens"
    )
    return f"{expected}; {OWN_DRAFT}" if verdict.decision == "full" else expected


def measured(value: float | None, interval: Interval | None) -> str:
    """A figure with its interval, for people."""
    if value is None:
        return "–"
    return f"{value:.2f}" if interval is None else f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def count(tokens: float) -> str:
    """A number of tokens to two digits, for people."""
    if not math.isfinite(tokens):
        return "no number of"
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if tokens >= unit:
            return f"{float(f'{tokens / unit:.2g}'):g} {name}"
    return f"{float(f'{tokens:.2g}'):,.0f}"
