# N rows, B rows of a batch, T positions, M positions of one answer, H hidden, C draft vocabulary, V vocabulary
"""Scores a target's answers from its shards and chooses those to adapt on: what `farm.data.select` needs of models.

One shard is in memory at a time. Rows that set the threshold come first: a pilot, or with `exact` all of them. `shift`
prefills every row with the base, `mahalanobis` those that set the threshold, `failure` runs the base draft over the
features, `flatness` the target's head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from farm.config import UserError
from farm.data import select
from farm.data.features import FEATURE_DTYPE, Sample, local_shards, read_shards, trainable_rows
from farm.data.prompts import Prompt
from farm.data.select import Scored, Shifts, Threshold
from farm.decode.regenerate import Recapture
from farm.draft.checkpoint import load_draft
from farm.draft.model import Draft, DraftHead
from farm.layers.cache import Rows
from farm.sections import Dtype, RegenerateSettings, SelectSettings, TargetSpec
from farm.store import local_copy
from farm.target.load import LoadedTarget, load_embedding_and_head, open_target
from farm.train.batches import collate
from farm.train.unroll import shift, unroll

BATCH_ROWS = 16
CHUNK = 256  # positions whose logits over the whole vocabulary are held at once


@dataclass(frozen=True)
class SelectTask:
    """Which answers of one target to choose; trunk and shards are locations of a store."""

    settings: SelectSettings
    base: TargetSpec
    target: TargetSpec
    dtype: Dtype  # that the base reads the answers in
    trunk_folder: str  # of the base draft
    shards: tuple[str, ...]  # of features-*.safetensors, their tokens beside them
    origins: Mapping[int, str]  # by row, see farm.data.prompts


@dataclass(frozen=True)
class PromptTask:
    """Which of one target's prompts to choose, before it answers any; see farm.train.prompt_scoring."""

    settings: SelectSettings  # with `before`
    regenerate: RegenerateSettings  # how prompts will be read
    base: TargetSpec
    target: TargetSpec
    dtype: Dtype  # that both read the prompts in
    prompts: tuple[Prompt, ...]
    origins: Mapping[int, str]  # by row, see farm.data.prompts


@dataclass(frozen=True)
class Selection:
    """Every scored row, what decided, and the rank correlation of `shift` and `mahalanobis` where both are known."""

    scored: tuple[Scored, ...]
    limit: Threshold
    num_pilot: int
    num_tokens: Mapping[int, int]  # by row, of what was scored
    agreement: float  # nan where they are not
    seconds: float

    @classmethod
    def of(
        cls,
        task: SelectTask | PromptTask,
        scored: Sequence[Scored],
        deciding: Collection[int],
        num_tokens: Mapping[int, int],
        agreement: float,
        started: float,
    ) -> Selection:
        """What the scores of the rows `deciding` let through; `started` on the monotonic clock.

        Raises UserError when nothing is left to choose.
        """
        settings = task.settings
        outliers = 0.0 if settings.strategy == "random" else select.OUTLIERS
        limit = select.threshold([row for row in scored if row.row in deciding], settings.fraction, outliers)
        seconds = time.monotonic() - started
        selection = cls(tuple(scored), limit, len(deciding), num_tokens, agreement, seconds)
        if not selection.rows:
            raise UserError(
                f"{task.target.name}: select.fraction {settings.fraction:g} keeps no row; raise it"
            )
        return selection

    @property
    def rows(self) -> frozenset[int]:
        """The chosen row numbers."""
        return frozenset(row.row for row in self.scored if self.limit.keeps(row))

    @property
    def realised_fraction(self) -> float:
        return len(self.rows) / len(self.scored)


def select_rows(task: SelectTask, progress: Callable[[int, int], None] | None = None) -> Selection:
    """Scores every answer that can be trained on and decides which are kept; `progress(rows done, of all)`.

    Raises UserError when no answer is long enough, or when none is left to choose.
    """
    started = time.monotonic()
    settings, paths = task.settings, local_shards(task.shards)
    ids = trainable_rows(paths)
    if not ids:
        raise UserError(f"{task.target.name}: no answer is long enough to train on; see its finish reasons")
    deciding = frozenset(ids) if settings.exact else select.pilot(ids, settings.pilot_rows)
    scorer, recapture = _scorer(task), Recapture.of(task.target, task.dtype)
    if isinstance(scorer, _Whitened):
        for path in paths:
            scorer.learn(read_shards([path], deciding, recapture))
    scored, lengths = [], {}
    for path in paths:
        samples = read_shards([path], ids.keys(), recapture)
        for sample, score in zip(samples, scorer.score(samples), strict=True):
            length = lengths[sample.row] = sample.num_said
            stratum = select.stratum_of(length, task.origins.get(sample.row, ""))
            scored.append(Scored(sample.row, sample.id, score, stratum))
        if progress is not None:
            progress(len(scored), len(ids))
    agreement = scorer.agreement() if isinstance(scorer, _Whitened) else math.nan
    return Selection.of(task, scored, deciding, lengths, agreement, started)


def pooled(sample: Sample) -> Tensor:
    """phi [H], float32: the mean hidden state over the tokens that the target said and processed."""
    return torch.cat([sample.features_TH[start:end] for start, end in sample.said]).float().mean(dim=0)


class _Whitened:
    """`shift` and `mahalanobis`, by the statistics of the base's phi over the rows that set the threshold."""

    def __init__(self, base: LoadedTarget, *, paired: bool) -> None:
        self._base, self._paired, self._shifts = base, paired, Shifts(paired=paired)
        self._phi: dict[int, Tensor] = {}  # of the base, by row: one vector a row

    def learn(self, samples: Sequence[Sample]) -> None:
        """Adds rows to the statistics."""
        if samples:
            self._shifts.learn(_stacked(samples), self._base_phi(samples))

    def score(self, samples: Sequence[Sample]) -> list[float]:
        if not samples:
            return []
        return self._shifts.score(_stacked(samples), self._base_phi(samples) if self._paired else None)

    def agreement(self) -> float:
        """Rank correlation of both scores over the rows that were learned from."""
        return self._shifts.agreement()

    def _base_phi(self, samples: Sequence[Sample]) -> Tensor:
        """phi [N, H] of the base on the same tokens; a row is read once."""
        missing = [sample for sample in samples if sample.row not in self._phi]
        missing.sort(key=lambda sample: len(sample.tokens_T))  # rows of one length waste no padding
        for start in range(0, len(missing), BATCH_ROWS):
            batch = missing[start : start + BATCH_ROWS]
            self._phi |= zip((sample.row for sample in batch), _read(self._base, batch), strict=True)
        return torch.stack([self._phi[sample.row] for sample in samples])


def _stacked(samples: Sequence[Sample]) -> Tensor:
    """phi [N, H] of the target."""
    return torch.stack([pooled(sample) for sample in samples])


def _read(base: LoadedTarget, samples: Sequence[Sample]) -> Iterator[Tensor]:
    """phi of the base by one prefill; padding comes last, where causal attention never sees it."""
    forward, length = base.forward, max(len(sample.tokens_T) for sample in samples) - 1
    tokens_BT = torch.zeros(len(samples), length, dtype=torch.int64)
    for row, sample in enumerate(samples):
        tokens_BT[row, : len(sample.tokens_T) - 1] = sample.tokens_T[:-1]
    cache = forward.new_cache(len(samples), length)
    hidden_BTH = forward.forward(tokens_BT.to(forward.device), Rows([0] * len(samples)), cache)
    rounded_BTH = hidden_BTH.to(FEATURE_DTYPE).cpu()  # as the target's were stored
    for sample, hidden_TH in zip(samples, rounded_BTH, strict=True):
        features_TH = hidden_TH[: len(sample.tokens_T) - 1]
        yield pooled(replace(sample, features_TH=features_TH))


class _Predicted:
    """`failure` and `flatness`, from the positions that training uses; the draft takes one step from true states."""

    def __init__(self, head: DraftHead, full_head_VH: Tensor, draft: Draft | None) -> None:
        self._head, self._full_head_VH, self._draft = head, full_head_VH, draft

    @torch.inference_mode()
    def score(self, samples: Sequence[Sample]) -> list[float]:
        return [self._score(sample) for sample in samples]

    def _score(self, sample: Sample) -> float:
        batch = collate([sample]).to(self._full_head_VH.device)
        mask_BT = batch.mask(0)
        hidden_MH = shift(batch.hidden_BTH, 1)[mask_BT]
        predicted_MH = hidden_MH
        if self._draft is not None:
            embedded_BTH = self._head.embed(batch.next_tokens_BT)
            predicted_MH = unroll(self._draft, embedded_BTH, batch.hidden_BTH, 1)[0][mask_BT]
        total = 0.0
        for hidden_CH, drafted_CH in zip(hidden_MH.split(CHUNK), predicted_MH.split(CHUNK), strict=True):
            p_CV = (hidden_CH @ self._full_head_VH.T).softmax(dim=-1)
            if self._draft is None:
                score = select.flatness(p_CV)
            else:
                q_MC = self._head.logits(drafted_CH).softmax(dim=-1)
                score = select.failure(self._head.restrict(p_CV), q_MC)
            total += score * len(hidden_CH)
        return total / len(hidden_MH) if len(hidden_MH) else math.nan


class _Random:
    def __init__(self, seed: int) -> None:
        self._seed = seed

    def score(self, samples: Sequence[Sample]) -> list[float]:
        return select.random([sample.id for sample in samples], self._seed)


def _scorer(task: SelectTask) -> _Whitened | _Predicted | _Random:
    strategy = task.settings.strategy
    if strategy == "random":
        return _Random(task.settings.seed)
    if strategy in ("shift", "mahalanobis"):
        return _Whitened(open_target(task.base, task.dtype), paired=strategy == "shift")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedding_VH, head_VH = (tensor.to(device) for tensor in load_embedding_and_head(task.target))
    if strategy == "flatness":
        return _Predicted(DraftHead.of(embedding_VH, head_VH, None), head_VH, None)
    draft = load_draft(local_copy(task.trunk_folder)).to(device).requires_grad_(False)
    return _Predicted(DraftHead.of(embedding_VH, head_VH, draft.trunk.vocabulary_C), head_VH, draft)
