# N rows, H hidden, M positions of one answer, C draft vocabulary, V vocabulary
"""Which answers to adapt on: a score for each row, and the rows that a fraction of the data keeps. Pure.

Scores, higher is kept first; phi is the mean hidden state over an answer's tokens:

    shift         delta' S^-1 delta / H      delta = phi_target - phi_base on the same tokens, S the covariance of
                                             phi_base. Our reading of EDA's "representation shift" (2603.09527).
    mahalanobis   (phi - mu)' S^-1 (phi - mu) / H      phi of the target, mu and S of the base: unpaired, so that it
                                             ranks an unusual topic as high as a changed behaviour.
    failure       1 - mean_m sum_c min(p, q)           the share of tokens that the base draft loses.
    flatness      mean_m entropy(p) / log V            flat predictions teach more (SFDD).
    random        uniform, from the row's id.

Two passes: moments of phi_base block by block, merged as Chan, Golub & LeVeque (1983) do, so that neither the number
nor the order of blocks matters; then a score for each row.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

OUTLIERS = 0.01  # share of the highest scores that is left out: broken rows, not informative ones
LEAST_SHARE = 0.5  # of its proportional share that every stratum keeps
RIDGE = 1e-4  # of the mean variance, added to every direction so that few rows can be whitened

Stratum = tuple[int, str]  # length bucket, source
Rank = tuple[float, str]  # score, then a hash of the row: no two rows rank the same


@dataclass(frozen=True)
class Moments:
    """Number, mean [H] and sum of centred outer products [H, H] of rows, in float64."""

    count: int
    mean_H: Tensor
    m2_HH: Tensor

    @classmethod
    def of(cls, values_NH: Tensor) -> Moments:
        """Of a block; rows with a value that is not finite are left out."""
        finite_NH = values_NH[values_NH.isfinite().all(dim=1)].double()
        size = finite_NH.shape[1]
        if not len(finite_NH):
            zeros_H = torch.zeros(size, dtype=torch.float64)
            return cls(0, zeros_H, torch.zeros(size, size, dtype=torch.float64))
        mean_H = finite_NH.mean(dim=0)
        centred_NH = finite_NH - mean_H
        return cls(len(finite_NH), mean_H, centred_NH.T @ centred_NH)

    def merge(self, other: Moments) -> Moments:
        """The moments of both blocks together."""
        count = self.count + other.count
        if not count:
            return self
        gap_H, weight = other.mean_H - self.mean_H, other.count / count
        between_HH = torch.outer(gap_H, gap_H) * (self.count * weight)
        return Moments(count, self.mean_H + gap_H * weight, self.m2_HH + other.m2_HH + between_HH)

    @property
    def covariance(self) -> Tensor:
        """Unbiased [H, H]; zeros for fewer than two rows."""
        return self.m2_HH / max(1, self.count - 1)


@dataclass(frozen=True)
class Whitening:
    """A mean and the Cholesky factor L of a shrunk covariance, S = L L'; scores solve with L, nothing is inverted."""

    mean_H: Tensor
    factor_HH: Tensor

    @classmethod
    def of(cls, moments: Moments) -> Whitening:
        """Raises ValueError without any row."""
        if not moments.count:
            raise ValueError("no finite row to take statistics of")
        return cls(moments.mean_H, torch.linalg.cholesky(shrunk_covariance(moments)))

    def squared_length(self, values_NH: Tensor) -> Tensor:
        """v' S^-1 v / H of each row [N], float64; nan where a row is not finite."""
        whitened_HN = torch.linalg.solve_triangular(self.factor_HH, values_NH.double().T, upper=False)
        mean_N: Tensor = whitened_HN.square().mean(dim=0)
        return mean_N


def shrunk_covariance(moments: Moments) -> Tensor:
    """Positive definite covariance [H, H], shrunk to a multiple of the identity by OAS (Chen et al., 0907.4698)."""
    s_HH, count = moments.covariance, moments.count
    size = len(s_HH)
    trace, of_square = float(s_HH.trace()), float(s_HH.square().sum())
    excess = (count + 1 - 2 / size) * (of_square - trace**2 / size)
    upper = (1 - 2 / size) * of_square + trace**2
    share = 1.0 if excess <= upper else max(0.0, upper / excess)
    variance = trace / size if trace > 0 else 1.0
    identity_HH = torch.eye(size, dtype=torch.float64)
    return (1 - share) * s_HH + (share + RIDGE) * variance * identity_HH


def shift(target_NH: Tensor, base_NH: Tensor, whitening: Whitening) -> Tensor:
    """Scores [N] of paired phi: both models read the same tokens."""
    return whitening.squared_length(target_NH.double() - base_NH.double())


def mahalanobis(target_NH: Tensor, whitening: Whitening) -> Tensor:
    """Scores [N] of the target's phi against the base's statistics."""
    return whitening.squared_length(target_NH.double() - whitening.mean_H)


class Shifts:
    """Scores of `shift`, if `paired`, or `mahalanobis` by the statistics of the rows that set the threshold."""

    def __init__(self, *, paired: bool) -> None:
        self._paired = paired
        self._learned: list[tuple[Tensor, Tensor]] = []  # phi [N, H] of target and base, block by block
        self._moments: Moments | None = None
        self._whitening: Whitening | None = None

    def learn(self, target_NH: Tensor, base_NH: Tensor) -> None:
        """Adds a block of rows that set the threshold: phi of both models."""
        block = Moments.of(base_NH)
        self._moments = block if self._moments is None else self._moments.merge(block)
        self._whitening = None
        self._learned.append((target_NH, base_NH))

    def score(self, target_NH: Tensor, base_NH: Tensor | None) -> list[float]:
        """Of any rows; the base's phi where they are paired. Raises ValueError before a finite row is known."""
        if not self._paired:
            return mahalanobis(target_NH, self._whitened()).tolist()
        assert base_NH is not None
        return shift(target_NH, base_NH, self._whitened()).tolist()

    def agreement(self) -> float:
        """Rank correlation of both scores over the rows that were learned from."""
        target_NH, base_NH = (torch.cat(blocks) for blocks in zip(*self._learned, strict=True))
        paired_N, unpaired_N = (
            shift(target_NH, base_NH, self._whitened()),
            mahalanobis(target_NH, self._whitened()),
        )
        return rank_correlation(paired_N.tolist(), unpaired_N.tolist())

    def _whitened(self) -> Whitening:
        if self._whitening is None:
            if self._moments is None:
                raise ValueError("no row to take statistics of")
            self._whitening = Whitening.of(self._moments)
        return self._whitening


def failure(p_MC: Tensor, q_MC: Tensor) -> float:
    """1 - expected acceptance of the base draft; `p_MC` holds the draft vocabulary's columns, not renormalised."""
    return 1.0 - float(p_MC.double().minimum(q_MC.double()).sum(dim=-1).mean())


def flatness(p_MV: Tensor) -> float:
    """Mean entropy of the target's predictions, 1 where all are uniform."""
    p = p_MV.double()
    return float(torch.special.entr(p).sum(dim=-1).mean()) / math.log(p.shape[-1])


def random(ids: Sequence[str], seed: int) -> list[float]:
    """Uniform in [0, 1), the same for a row wherever it is scored."""
    return [int(_hash(f"random {seed} {name}")[:13], 16) / 16**13 for name in ids]


@dataclass(frozen=True)
class Scored:
    """One answer with its score; rows compete inside their stratum for half of its share."""

    row: int
    id: str
    score: float
    stratum: Stratum
    rank: Rank = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", (self.score, _hash(f"{self.id} {self.row}")))


@dataclass(frozen=True)
class Threshold:
    """Keeps a row by its own score alone, so that rows can be decided on as they come."""

    least: Rank
    of_stratum: Mapping[Stratum, Rank]
    outliers: Rank  # left out from here on

    def keeps(self, row: Scored) -> bool:
        if not math.isfinite(row.score) or row.rank >= self.outliers:
            return False
        return row.rank >= min(self.least, self.of_stratum.get(row.stratum, self.least))


def stratum_of(num_answer_tokens: int, source: str) -> Stratum:
    """Answers within a factor of two in length, of one source."""
    return num_answer_tokens.bit_length(), source


def threshold(rows: Sequence[Scored], fraction: float, outliers: float = OUTLIERS) -> Threshold:
    """What keeps `fraction` of these rows, the highest scores that are no outliers first.

    Every stratum keeps the best rows of at least LEAST_SHARE of its share. Rows whose score is not finite count for
    the fraction and are never kept.
    """
    ranked = sorted((row for row in rows if math.isfinite(row.score)), key=lambda row: row.rank, reverse=True)
    dropped = int(outliers * len(ranked))
    candidates = ranked[dropped:]
    wanted = min(len(candidates), round(fraction * len(rows)))
    sizes = Counter(row.stratum for row in rows)
    floors = {stratum: int(LEAST_SHARE * fraction * size) for stratum, size in sizes.items()}
    of_stratum: dict[Stratum, Rank] = {}
    rest: list[Rank] = []
    taken: Counter[Stratum] = Counter()
    for row in candidates:
        if taken[row.stratum] < floors[row.stratum]:
            taken[row.stratum] += 1
            of_stratum[row.stratum] = row.rank
        else:
            rest.append(row.rank)
    fill = wanted - taken.total()
    return Threshold(
        least=rest[fill - 1] if fill > 0 else (math.inf, ""),
        of_stratum=of_stratum,
        outliers=ranked[dropped - 1].rank if dropped else (math.inf, ""),
    )


def choose(rows: Sequence[Scored], fraction: float, outliers: float = OUTLIERS) -> frozenset[int]:
    """The row numbers that `threshold` of these very rows keeps."""
    limit = threshold(rows, fraction, outliers)
    return frozenset(row.row for row in rows if limit.keeps(row))


def pilot(ids: Mapping[int, str], size: int) -> frozenset[int]:
    """`size` of the rows {number: id} that stand for all of them, wherever in the file they are."""
    return frozenset(sorted(ids, key=lambda row: _hash(f"pilot {ids[row]} {row}"))[:size])


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's, with mean ranks for ties; nan for fewer than two rows or a constant side."""
    ranks = [_mean_ranks(np.asarray(side, dtype=np.float64)) for side in (left, right)]
    centred = [side - side.mean() for side in ranks]
    scale = math.sqrt(float((centred[0] ** 2).sum() * (centred[1] ** 2).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale else math.nan


def _mean_ranks(
    values_N: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    _, index_N, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank: np.ndarray[tuple[int], np.dtype[np.float64]] = (last - (counts - 1) / 2)[index_N]
    return mean_rank


def _hash(text: str) -> str:
    # The prefix keeps it apart from the other hashes of ids, such as the one that says which answers are greedy.
    return hashlib.sha256(f"select {text}".encode()).hexdigest()
