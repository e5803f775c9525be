# T tokens of a prompt, H hidden
"""Scores a target's prompts before it answers any and chooses those that it is to answer; nothing is generated.

phi of a prompt is the mean hidden state over its own tokens, those behind what all prompts begin with: there the
states are the same for all, and would weigh the more the shorter a prompt is. Scores and threshold are those of
answers (farm.data.select), with this phi: `shift` prefills every prompt with both models, one model after the other,
`mahalanobis` with the base only those that set the threshold, `random` none.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from farm.config import UserError
from farm.data import select
from farm.data.select import Scored, Shifts
from farm.decode.conversation import Conversation
from farm.decode.regenerate import Recapture
from farm.target.load import LoadedTarget, open_target
from farm.train.scoring import PromptTask, Selection

BLOCK_ROWS = 256  # whose hidden states are in memory at once
UNREAD = 0  # stands behind a prompt: a prefill does not read the last token that it is given

Openings = Mapping[int, Sequence[int]]  # what the target reads before its first answer, by row
Progress = Callable[[int, int], None]


def select_prompt_rows(task: PromptTask, progress: Progress | None = None) -> Selection:
    """Scores every prompt and decides which are answered; `progress(rows done, of all)`.

    A prompt that cannot be answered (it leaves no room, the template fails on it) has no score and is never chosen.
    Raises UserError when none can be, or when none is left to choose.
    """
    started, settings = time.monotonic(), task.settings
    ids = {prompt.row: prompt.id for prompt in task.prompts}
    deciding = frozenset(ids) if settings.exact else select.pilot(ids, settings.pilot_rows)
    openings, target_phi = _read_by_target(task, progress)
    if settings.strategy == "random":
        scores = dict(zip(ids, select.random(list(ids.values()), settings.seed), strict=True))
        agreement = math.nan
    else:
        scores, agreement = _score_shifts(task, openings, target_phi, deciding)
    shared, scored, lengths = _shared_tokens(openings), [], {}
    for row, name in ids.items():
        readable = row in openings
        length = lengths[row] = len(openings[row]) - shared if readable else 0
        stratum = select.stratum_of(length, task.origins.get(row, ""))
        scored.append(Scored(row, name, scores[row] if readable else math.nan, stratum))
    return Selection.of(task, scored, deciding, lengths, agreement, started)


def _read_by_target(task: PromptTask, progress: Progress | None) -> tuple[Openings, dict[int, Tensor]]:
    """What the target reads of every prompt that it can answer, and its phi of them unless chance decides."""
    target = open_target(task.target, task.dtype)
    openings = _openings(target, task)
    if task.settings.strategy == "random":
        return openings, {}
    return openings, _phi(Recapture(lambda: target), openings, openings, progress)


def _openings(target: LoadedTarget, task: PromptTask) -> Openings:
    openings, first_error = dict[int, Sequence[int]](), ""
    for prompt in task.prompts:
        try:
            openings[prompt.row] = Conversation.of(target, prompt, task.regenerate).opening
        except UserError as error:
            first_error = first_error or str(error)
    if not openings:
        count = len(task.prompts)
        raise UserError(f"{task.target.name}: none of its {count} prompts can be answered: {first_error}")
    return openings


def _shared_tokens(openings: Openings) -> int:
    """How many tokens all prompts begin with; each has at least one of its own."""
    common = len(os.path.commonprefix([tuple(ids) for ids in openings.values()]))
    return min(common, *(len(ids) - 1 for ids in openings.values()))


def _phi(
    capture: Recapture, openings: Openings, rows: Collection[int], progress: Progress | None = None
) -> dict[int, Tensor]:
    """phi [H] of these rows, float32; one vector a row is all that stays in memory."""
    shared, found = _shared_tokens(openings), dict[int, Tensor]()
    order = sorted(rows, key=lambda row: len(openings[row]))  # rows of one length waste no padding
    for block in _blocks(order):
        states = capture([[*openings[row], UNREAD] for row in block])
        for row, hidden_TH in zip(block, states, strict=True):
            found[row] = hidden_TH[shared:].float().mean(dim=0)
        if progress is not None:
            progress(len(found), len(order))
    return found


def _score_shifts(
    task: PromptTask, openings: Openings, target_phi: Mapping[int, Tensor], deciding: Collection[int]
) -> tuple[dict[int, float], float]:
    """Scores by row, and how far both strategies agree on the rows that set the threshold."""
    rows = list(openings)
    learned = [row for row in rows if row in deciding]
    if not learned:
        raise UserError(
            f"{task.target.name}: none of the {len(deciding)} prompts that set the threshold can be answered; "
            "raise select.pilot_rows or set select.exact"
        )
    paired = task.settings.strategy == "shift"
    base_phi = _phi(Recapture.of(task.base, task.dtype), openings, rows if paired else learned)
    shifts = Shifts(paired=paired)
    for block in _blocks(learned):
        shifts.learn(_stacked(target_phi, block), _stacked(base_phi, block))
    scores = list[float]()
    for block in _blocks(rows):
        base_NH = _stacked(base_phi, block) if paired else None
        scores += shifts.score(_stacked(target_phi, block), base_NH)
    return dict(zip(rows, scores, strict=True)), shifts.agreement()


def _blocks(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    return (rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS))


def _stacked(phi: Mapping[int, Tensor], rows: Sequence[int]) -> Tensor:
    """[N, H] of these rows."""
    return torch.stack([phi[row] for row in rows])
