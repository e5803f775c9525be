"""What a selection is keyed by, and what of a target's prompts one has chosen. Needs neither Ray nor torch.

Answers are selected once they are there; with `select.before` prompts are, and only the chosen ones are answered. The
rows that a selection chooses follow from its key, so that whatever is made of them is keyed by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pyarrow.parquet as pq

from farm.artifacts import Artifact, Artifacts, key_of
from farm.config import Manifest, dump
from farm.data.chat import read_template
from farm.fleet.answers import ANSWERS, AnswersJob

SELECT = "select"
SCORES_FILE = "scores.parquet"


def answers_selection_key(
    manifest: Manifest, answers: AnswersJob, origins: Mapping[int, str], digests: Sequence[str]
) -> str | None:
    """The key of a selection among `answers`; None where none is made of them. `digests`: of trunk, base, target."""
    if manifest.select.strategy == "all" or manifest.select.before:
        return None
    return key_of(SELECT, _config(manifest, answers, origins), [answers.key, *digests])


def prompts_selection_key(
    manifest: Manifest, answers: AnswersJob, origins: Mapping[int, str], digests: Sequence[str]
) -> str | None:
    """The key of a selection among the prompts of `answers`; None without one. `digests`: of prompts, base, target.

    How answers are sampled and which trunk drafts them is no part of it: it decides nothing about the prompts.
    """
    if not manifest.select.before:
        return None
    config = _config(manifest, answers, origins) | {
        "before": True,
        "rows": [prompt.row for prompt in answers.prompts],
        "template": read_template(answers.spec.chat_template),
        "turns": answers.settings.turns,
    }
    return key_of(SELECT, config, digests)


def _config(manifest: Manifest, answers: AnswersJob, origins: Mapping[int, str]) -> dict[str, object]:
    """Without `before`, so that a selection of answers has the key of a store that knows no other."""
    settings = {name: value for name, value in dump(manifest.select).items() if name != "before"}
    sources = [origins[prompt.row] for prompt in answers.prompts]
    return settings | {"dtype": manifest.dtype, "origins": sources}


def answers_to_chosen(answers: AnswersJob, select_key: str) -> AnswersJob:
    """The job to answer what the selection `select_key` chooses of these prompts; all of them are still in it.

    Its manifest names the selection, so that cleaning up keeps both or neither.
    """
    source = {**answers.source, "select_key": select_key}
    return replace(answers, key=key_of(ANSWERS, {}, [answers.key, select_key]), source=source)


def only_chosen(answers: AnswersJob, artifacts: Artifacts, selection: Artifact) -> AnswersJob:
    """The job without the prompts that a finished selection has left out; rows keep their numbers and ids."""
    rows = chosen_rows(artifacts, selection)
    return replace(answers, prompts=tuple(prompt for prompt in answers.prompts if prompt.row in rows))


def chosen_rows(artifacts: Artifacts, selection: Artifact) -> frozenset[int]:
    """Numbers of the rows that a finished selection has chosen."""
    table = pq.read_table(artifacts.path(selection, SCORES_FILE), columns=["row", "chosen"])
    return frozenset(row["row"] for row in table.to_pylist() if row["chosen"])
