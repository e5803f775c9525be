"""Where a family's trunk comes from, what it is trained on, and its key. Pure, like the plan that it is part of."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from farm.artifacts import TRUNK, Artifacts, key_of
from farm.config import Manifest, UserError, dump
from farm.data.prompts import Prompt, first_of_equals, load_prompts, not_held_out
from farm.fleet.answers import AnswersJob, answers_key, settings_key
from farm.fleet.records import TargetPlan, TrunkPlan
from farm.fleet.stage_keys import TRUNK_FILES, training_key
from farm.registry import Registry
from farm.sections import RegenerateSettings, Rows, TargetSpec
from farm.store import local_copy

NO_PROMPTS = (
    "train_trunk: there are no prompts to train a trunk on, since no target can be used; repair the targets, "
    "or give train_trunk.prompts"
)
MOST_LOST = 8  # trunks of the same settings, one after the other


def plan_trunk(
    manifest: Manifest,
    artifacts: Artifacts,
    base: TargetSpec,
    base_digest: str,
    targets: Sequence[TargetPlan],
) -> TrunkPlan:
    """The trunk's plan beside targets whose prompts are split already.

    UserError where a given folder is no trunk, or one has to be trained and all prompts for it are held out.
    """
    prompts, held_out, digests, rows = _base_prompts(manifest, targets)
    own = manifest.train_trunk.prompts
    if manifest.trunk is not None:
        folder = local_copy(manifest.trunk)
        key = key_of(TRUNK, {}, [base_digest, _folder_digest(folder)])
        reused = artifacts.find(TRUNK, key) is not None
        return TrunkPlan(key, base, base_digest, folder, None, held_out, reused)
    # Without prompts of its own, a trunk is trained once on those of the targets known then: a target
    # that is added later must not change the trunk that all others were adapted to.
    key = _unless_lost(artifacts, _trained_key(manifest, base_digest, [*digests, rows] if own else []))
    reused = artifacts.find(TRUNK, key) is not None
    if not prompts and not reused and (targets or own):
        raise UserError(_all_held_out(own))
    answers = _base_answers(manifest, base, base_digest, prompts, digests) if prompts and not reused else None
    return TrunkPlan(key, base, base_digest, None, answers, held_out, reused)


def _unless_lost(artifacts: Artifacts, key: str) -> str:
    """`key`; once the store has lost the trunk of that key that its family was adapted on, that of the next one.

    Trained again it is another trunk, perhaps on other prompts: under the same key, adapters of the lost one would be
    found again, and fit nowhere.
    """
    keys = [key]
    while len(keys) <= MOST_LOST:
        keys.append(key_of(TRUNK, {}, [keys[-1]]))
    present = next((one for one in keys if artifacts.find(TRUNK, one) is not None), None)
    if present is not None:
        return present
    lost = Registry(artifacts.store).trunk_key()
    return keys[keys.index(lost) + 1] if lost in keys[:-1] else key


def _trained_key(manifest: Manifest, base_digest: str, own: Sequence[str | Rows | None]) -> str:
    """`own`: the digest of the trunk's own prompts and the rows of them; empty without any."""
    config = training_key(manifest.train_trunk) | {
        "draft": dump(manifest.draft),
        "regenerate": settings_key(_base_regenerate(manifest)),
        "dtype": manifest.dtype,
        "own": own,
    }
    return key_of(TRUNK, config, [base_digest])


def _base_answers(
    manifest: Manifest,
    base: TargetSpec,
    base_digest: str,
    prompts: tuple[Prompt, ...],
    digests: Sequence[str],
) -> AnswersJob:
    """The base's own answers to `prompts`; `digests` of their sources."""
    regenerate, mode, dtype = _base_regenerate(manifest), manifest.train_trunk.answers, manifest.dtype
    joined = key_of("prompts", {}, digests)
    key = answers_key(base, regenerate, mode, dtype, base_digest, prompts, joined)
    source = {"target_digest": base_digest, "prompts_digest": joined, "row_errors": []}
    return AnswersJob(base, regenerate, key, prompts, mode, dtype, source)


def _base_prompts(
    manifest: Manifest, targets: Sequence[TargetPlan]
) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...], list[str], Rows | None]:
    """Prompts for the trunk, prompts held out from it, the digests of their sources, the rows of its own source."""
    settings, wanted = manifest.train_trunk, manifest.evaluate.prompts
    each = -(-wanted // max(1, len(targets)))
    held_out = tuple(prompt for target in targets for prompt in target.held_out[:each])[:wanted]
    # What is held out for one target stays out of the trunk, which drafts for all, whoever else asks it.
    measured_on = [prompt for target in targets for prompt in target.held_out]
    if not settings.prompts:
        asked = first_of_equals(prompt for target in targets for prompt in target.answers.prompts)
        # Rows are numbered anew: each source counts its own from 0.
        numbered = enumerate(not_held_out(asked, measured_on))
        prompts = tuple(replace(prompt, row=row) for row, prompt in numbered)
        return prompts, held_out, [target.held_out_digest for target in targets], None
    found = load_prompts(settings.prompts)
    rows = settings.rows or (0, max(1, found.num_rows - wanted))
    used = range(found.num_rows)[slice(*rows)]
    outside = tuple(prompt for prompt in found.prompts if prompt.row not in used)[-wanted:]
    prompts = tuple(prompt for prompt in found.prompts if prompt.row in used)
    if not prompts:
        raise UserError(
            f"train_trunk.rows: selects none of the {found.num_rows} rows of {found.source}; "
            "correct the range or add prompts"
        )
    return not_held_out(prompts, [*measured_on, *outside]), outside or held_out, [found.digest], rows


def _all_held_out(source: str | None) -> str:
    remedy = "give a file with other prompts, or hold out less: evaluate.rows, evaluate.prompts"
    if source:
        return f"train_trunk.prompts: every prompt of {source} that a trunk would be trained on is held out; {remedy}"
    return (
        f"train_trunk.prompts: is not set, and all that the targets ask is held out for one of them; {remedy}"
    )


def _base_regenerate(manifest: Manifest) -> RegenerateSettings:
    settings = manifest.train_trunk
    return manifest.regenerate.model_copy(
        update={
            "rows": None,
            "engine": "farm",
            "draft": "off",  # there is no trunk yet
            "max_new_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "greedy_share": settings.greedy_share,
            "seed": settings.seed,
        }
    )


def _folder_digest(folder: Path) -> str:
    """Names the content of a given trunk's folder."""
    digest = hashlib.sha256()
    for name in TRUNK_FILES:
        path = folder / name
        if not path.is_file():
            raise UserError(f"trunk: {path} does not exist; give a folder that `farm train-trunk` wrote")
        digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()
