# B requests, V tokens of the vocabulary
"""Sampling settings, the distribution they define, and counter-based randomness.

Target and draft logits pass the same `distribution`; what it returns is what is sampled and what is verified.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from farm.decode.penalties import Penalties

# What a random number is for; a number is never used twice.
DRAFT, ACCEPT, NEXT = 0, 1, 2
FILTER_WIDTH = 256  # largest logits of a row that top-p looks at before it sorts the whole vocabulary


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded. temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 switch those filters off.

    Penalties and `logit_bias` (token id, value) are described in farm/decode/penalties.py; `stop_ids` end this
    request besides the engine's own. A round drafts at most `max_drafted` tokens for this request, fewer where the
    engine's control says so; 0 decodes it plainly, None leaves it to the control. `logprobs` asks for the
    log-probabilities of its tokens, and of that many alternatives to each (farm/decode/logprobs.py).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    max_new_tokens: int = 128
    min_p: float = 0.0  # of the largest probability
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_ids: frozenset[int] = frozenset()
    max_drafted: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, wanted, holds in (
            ("temperature", "at least 0", self.temperature >= 0),
            ("top_p", "above 0 and at most 1", 0 < self.top_p <= 1),
            ("top_k", "at least 0", self.top_k >= 0),
            ("min_p", "from 0 to 1", 0 <= self.min_p <= 1),
            ("repetition_penalty", "above 0", self.repetition_penalty > 0),
            ("max_new_tokens", "at least 1", self.max_new_tokens >= 1),
            ("max_drafted", "at least 0", (self.max_drafted or 0) >= 0),
            ("logprobs", "at least 0", (self.logprobs or 0) >= 0),
        ):
            if not holds:
                raise ValueError(f"{name} {getattr(self, name)}: has to be {wanted}")

    @functools.cached_property
    def penalised(self) -> bool:
        """Whether anything is done to logits before temperature."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any(penalties) or bool(self.logit_bias)


class Columns(NamedTuple):
    """The settings of B requests as tensors [B]."""

    temperature_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor
    round_B: Tensor


@dataclass(frozen=True)
class SamplingBatch:
    """The settings of B requests; as columns where something asks for them, which greedy rounds never do."""

    params: tuple[SamplingParams, ...]
    # Verification rounds of each request; with it every draw has a counter of its own.
    rounds: tuple[int, ...]
    penalties: Penalties | None = None

    @classmethod
    def of(
        cls, params: Sequence[SamplingParams], rounds: Sequence[int], penalties: Penalties | None = None
    ) -> SamplingBatch:
        return cls(tuple(params), tuple(rounds), penalties)

    @functools.cached_property
    def greedy(self) -> bool:
        """Whether every request is: no probabilities are needed."""
        return all(one.temperature == 0 for one in self.params)

    @functools.cached_property
    def filtered(self) -> bool:
        """Whether some request has top_k, top_p or min_p."""
        return any(one.top_k > 0 or one.top_p < 1 or one.min_p > 0 for one in self.params)

    @functools.cached_property
    def columns(self) -> Columns:
        params = self.params
        real = ([one.temperature for one in params], [one.top_p for one in params])
        temperature_B, top_p_B = (torch.tensor(values, dtype=torch.float32) for values in real)
        whole = ([one.top_k for one in params], [one.seed for one in params], self.rounds)
        top_k_B, seed_B, round_B = (torch.tensor(values, dtype=torch.int64) for values in whole)
        min_p_B = torch.tensor([one.min_p for one in params], dtype=torch.float32)
        return Columns(temperature_B, top_p_B, top_k_B, min_p_B, seed_B, round_B)

    def repeat(self, num: int) -> SamplingBatch:
        """Every request `num` times in a row, for `num` positions of it at once; penalties have been applied."""
        return self.rows([row for row in range(len(self.params)) for _ in range(num)])

    def rows(self, rows: Sequence[int]) -> SamplingBatch:
        """The settings of some of the requests; penalties have been applied."""
        return SamplingBatch(tuple(self.params[row] for row in rows), tuple(self.rounds[row] for row in rows))

    def uniform(self, index: int, use: int) -> Tensor:
        """u in [0, 1) as float64 [B], a function of (seed, round, index in the round, use) alone."""
        return uniform(self.columns.seed_B, self.columns.round_B, index, use)

    def uniforms(self, num: int, use: int) -> Tensor:
        """`uniform` of the indices 0..num - 1, [B, num]."""
        seed_B1, round_B1 = self.columns.seed_B[:, None], self.columns.round_B[:, None]
        return uniform(seed_B1, round_B1, torch.arange(num), use)


def uniform(seed: Tensor, round_: Tensor, index: int | Tensor, use: int) -> Tensor:
    """Counter-based uniform numbers in [0, 1), float64, by splitmix64 over the mixed counters."""
    state = _mix(seed + _wrap(0x9E3779B97F4A7C15))
    for counter in (round_, index, use):
        state = _mix(state ^ _mix(torch.as_tensor(counter, dtype=torch.int64) + _wrap(0x9E3779B97F4A7C15)))
    return _shift(state, 11).to(torch.float64) / float(1 << 53)


def distribution(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """Probabilities [B, V] float32 of temperature, top-k, top-p and min-p, renormalised; one-hot where greedy."""
    hot_B = (batch.columns.temperature_B > 0).to(logits_BV.device)
    if not bool(hot_B.all()):
        p_BV = torch.zeros(logits_BV.shape, device=logits_BV.device)
        p_BV.scatter_(-1, logits_BV.argmax(dim=-1, keepdim=True), 1.0)
        if bool(hot_B.any()):
            rows = hot_B.nonzero().squeeze(1)
            p_BV[rows] = distribution(logits_BV[rows], batch.rows(rows.tolist()))
        return p_BV
    logits_BV = logits_BV.float() / batch.columns.temperature_B.to(logits_BV.device)[:, None]
    if batch.filtered:
        logits_BV = _filter(logits_BV, batch)
    return logits_BV.softmax(dim=-1)


def draw(p_BV: Tensor, u_B: Tensor) -> Tensor:
    """One token [B] a row by inversion: the first whose cumulative probability exceeds u. p need not sum to 1.

    Tokens of probability 0 are never drawn: the search is to the right of ties and its threshold below the total. Where
    there is no other, or p is no number, it is the last column: what follows may index with it.
    """
    cdf_BV = p_BV.to(torch.float64).cumsum(dim=-1)
    total_B1 = cdf_BV[:, -1:]
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    threshold_B1 = torch.minimum(u_B.to(cdf_BV.device)[:, None] * total_B1, below_B1)
    return torch.searchsorted(cdf_BV, threshold_B1, right=True).squeeze(-1).clamp(max=p_BV.shape[1] - 1)


def _filter(logits_BV: Tensor, batch: SamplingBatch) -> Tensor:
    """Logits with -inf outside top-k, top-p and min-p. Most rows need only their largest values, few a whole sort."""
    vocab = logits_BV.shape[-1]
    width = min(vocab, FILTER_WIDTH)
    top_k_B = torch.where(batch.columns.top_k_B > 0, batch.columns.top_k_B, vocab).to(logits_BV.device)
    top_p_B = torch.where(batch.columns.top_p_B < 1, batch.columns.top_p_B, torch.inf).to(logits_BV.device)
    ranked_BW, order_BW = logits_BV.topk(width, dim=-1)
    mass_B = (ranked_BW - logits_BV.logsumexp(dim=-1, keepdim=True)).exp().sum(dim=-1)
    open_B = (top_k_B >= vocab) & (top_p_B == torch.inf)
    enough_B = (top_k_B <= width) | ((top_k_B >= vocab) & (mass_B > top_p_B))
    short_B = ~enough_B & ~open_B & (width < vocab)
    kept_BV = torch.where(open_B[:, None], logits_BV, -torch.inf)
    kept_BV.scatter_(-1, order_BW, _cut(ranked_BW, logits_BV, top_k_B, top_p_B))
    if bool(short_B.any()):
        rows = short_B.nonzero().squeeze(1)
        ranked_RV, order_RV = logits_BV[rows].sort(dim=-1, descending=True, stable=True)
        whole_RV = _cut(ranked_RV, logits_BV[rows], top_k_B[rows], top_p_B[rows])
        kept_BV[rows] = torch.empty_like(whole_RV).scatter_(-1, order_RV, whole_RV)
    least_B1 = (
        ranked_BW[:, :1] + batch.columns.min_p_B.to(logits_BV.device).log()[:, None]
    )  # -inf where it is off
    return kept_BV.masked_fill(kept_BV < least_B1, -torch.inf)


def _cut(ranked_BW: Tensor, logits_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """The largest logits of each row, descending, with -inf beyond top-k and top-p; the first always stays.

    top-p is a share of what top-k left; `top_p_B` is inf where it is off, whatever the cumulative sum rounds to.
    """
    inside_BW = torch.arange(ranked_BW.shape[1], device=ranked_BW.device) < top_k_B[:, None]
    of_top_k_B = ranked_BW.masked_fill(~inside_BW, -torch.inf).logsumexp(dim=-1)
    everything_B = top_k_B >= logits_BV.shape[1]
    total_B = torch.where(everything_B, logits_BV.logsumexp(dim=-1), of_top_k_B)
    p_BW = (ranked_BW - total_B[:, None]).exp()
    inside_BW &= p_BW.cumsum(dim=-1) - p_BW < top_p_B[:, None]
    inside_BW[:, 0] = True
    return ranked_BW.masked_fill(~inside_BW, -torch.inf)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _wrap(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(constant: int) -> int:
    """The int64 that has the bits of an unsigned constant."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant
