"""The answers artifact of one target: what it is keyed by, which of its shards are missing, how it is
finished.

Needs neither Ray nor torch. A shard is two files of `farm.data.features` and a card that is written after
them, names them, and is never replaced.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pydantic import SecretStr

from farm.artifacts import Artifact, Artifacts, key_of
from farm.config import Refused, UserError, dump
from farm.data.chat import read_template
from farm.data.prompts import Prompt
from farm.data.rejects import listed, repeated
from farm.data.shards import shard_names
from farm.sections import Dtype, RegenerateSettings, TargetSpec
from farm.store import NotFound

ANSWERS = "answers"
# They say where and how fast the work runs and what is kept of it, not which tokens come out. `batch_rows` does: where
# kernels are not the farm's own, products round by their number of rows, and in bfloat16 many an answer follows that.
_NOT_IN_KEY = (
    "memory_bytes", "rows", "features", "byte_budget", "draft",
    "url", "api_key_env", "concurrency", "retries", "timeout_s",
)  # fmt: skip
# Of a shard's card, what is summed over all.
_SUMMED = ("rows", "answer_tokens", "feature_bytes", "seconds", "rejected")


@dataclass(frozen=True)
class AnswersJob:
    """Answers of `spec` to `prompts`, decoded or (mode `dataset`) prefilled, in artifacts/answers/<key>/."""

    spec: TargetSpec
    settings: RegenerateSettings
    key: str
    prompts: tuple[Prompt, ...]
    mode: Literal["regenerate", "dataset"] = "regenerate"
    dtype: Dtype = "auto"
    source: Mapping[str, Any] = field(default_factory=dict)  # goes into the manifest: digests, broken rows
    selected: bool = False  # some of the answers are dropped: no features are kept, since theirs may not be

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def num_shards(self) -> int:
        return -(-len(self.prompts) // self.settings.shard_rows)

    @property
    def feature_bytes(self) -> int:
        """Features that one shard may keep."""
        if self.selected or self.settings.features == "stream":
            return 0
        return self.settings.byte_budget // max(1, self.num_shards)

    def shard(self, number: int) -> tuple[Prompt, ...]:
        """The prompts of one shard, in order."""
        size = self.settings.shard_rows
        return self.prompts[number * size : (number + 1) * size]

    def without_prompts(self) -> "AnswersJob":
        """The job as actors need it: prompts travel with their shards."""
        return replace(self, prompts=())


def answers_key(
    spec: TargetSpec,
    settings: RegenerateSettings,
    mode: str,
    dtype: str,
    target_digest: str,
    prompts: Sequence[Prompt],
    prompts_digest: str,
) -> str:
    """The key of a target's answers: checkpoint, template, prompts and their rows, settings."""
    config = settings_key(settings) | {
        "mode": mode,
        "dtype": dtype,
        "template": read_template(spec.chat_template),
    }
    config["rows"] = [prompt.row for prompt in prompts]
    return key_of(ANSWERS, config, [target_digest, prompts_digest])


def settings_key(settings: RegenerateSettings) -> dict[str, Any]:
    """The settings that decide an answer, the engine among them: each samples in its own way."""
    decide = {name: value for name, value in dump(settings).items() if name not in _NOT_IN_KEY}
    if settings.engine == "farm":
        del decide["engine"]
    return decide


def endpoint_key(settings: RegenerateSettings) -> SecretStr | None:
    """The key of the endpoint that answers, from this process's environment; UserError if it is not there."""
    name = settings.api_key_env
    if settings.engine == "farm" or name is None:
        return None
    if name not in os.environ:
        raise UserError(
            f"regenerate.api_key_env: the environment has no {name}; export it with the endpoint's key"
        )
    return SecretStr(os.environ[name])


def card_name(shard: int) -> str:
    """Name of a shard's card; the shard is finished once it exists."""
    return f"shard-{shard:05d}.json"


def put_card(artifacts: Artifacts, key: str, shard: int, card: Mapping[str, Any]) -> bool:
    """Finish a shard with the two `files` that its card names; if another run was faster, they are deleted.

    Returns whether these are the shard's files.
    """
    if artifacts.put_once(ANSWERS, key, card_name(shard), json.dumps(card).encode()):
        return True
    for name in card["files"]:
        artifacts.store.delete(f"artifacts/{ANSWERS}/{key}/{name}")
    return False


def missing_shards(artifacts: Artifacts, job: AnswersJob) -> list[int]:
    """Numbers of the shards that are not finished yet; none for a finished artifact."""
    if artifacts.find(ANSWERS, job.key):
        return []
    present = set(artifacts.files(ANSWERS, job.key))
    return [number for number in range(job.num_shards) if card_name(number) not in present]


def kept_bytes(artifacts: Artifacts, job: AnswersJob) -> int:
    """Bytes of the features that the store holds of a job. UserError if a shard's card cannot be read."""
    present = set(artifacts.files(ANSWERS, job.key))
    return sum(
        int(_card(artifacts, job, number).get("feature_bytes", 0))
        for number in range(job.num_shards)
        if card_name(number) in present
    )


def finish_answers(artifacts: Artifacts, job: AnswersJob) -> Artifact:
    """Sum the shards' cards and write the manifest.

    Raises Refused when every row is an error, or is rejected; UserError when a card cannot be read.
    """
    found = artifacts.find(ANSWERS, job.key)
    if found:
        return found
    cards = [_card(artifacts, job, number) for number in range(job.num_shards)]
    sums = {name: sum(card[name] for card in cards) for name in _SUMMED}
    reasons, faults = Counter[str](), Counter[str]()
    seen: set[str] = set()
    for card in cards:
        reasons.update(card["finish_reasons"])
        faults.update(card["faults"] | {"duplicate": len(repeated(card["digests"], seen))})
    faults = +faults  # those that occur
    sums["rejected"] += faults["duplicate"] if "duplicate" in job.settings.reject else 0
    first_error = next((card["first_error"] for card in cards if card["first_error"]), None)
    if reasons["error"] == sums["rows"]:
        raise Refused(
            f"{job.name}: none of its {sums['rows']} prompts got an answer; the first failed with: {first_error}"
        )
    if reasons["error"] + sums["rejected"] == sums["rows"]:
        why = listed(faults, job.settings.reject)
        raise Refused(
            f"{job.name}: none of its {sums['rows']} answers can be trained on ({why}); "
            "read a few, raise regenerate.max_new_tokens, or name fewer faults in regenerate.reject"
        )
    made = {
        "target": job.name,
        **sums,
        "finish_reasons": dict(reasons),
        "faults": dict(faults),
        "first_error": first_error,
        "settings": dump(job.settings),
        "mode": job.mode,
        **job.source,
    }
    return artifacts.finish(ANSWERS, job.key, made, _files(cards))


def _files(cards: Sequence[Mapping[str, Any]]) -> set[str]:
    """What shards consist of: of two runs that wrote one, the files of the one whose card it is.

    Cards from before writers had names say nothing.
    """
    names = {card_name(number) for number in range(len(cards))}
    for number, card in enumerate(cards):
        names.update(card.get("files", shard_names(number)))
    return names


def _card(artifacts: Artifacts, job: AnswersJob, number: int) -> dict[str, Any]:
    key = f"artifacts/{ANSWERS}/{job.key}/{card_name(number)}"
    try:
        data = artifacts.store.get(key)
    except NotFound as error:
        raise UserError(f"{artifacts.store.uri}/{key}: is gone; run again") from error
    try:
        found: dict[str, Any] = json.loads(data)
    except ValueError as error:
        where = artifacts.store.location(key)
        raise UserError(f"{where}: is no whole card of a shard; delete it, then run again") from error
    return found


def feature_shards(artifact: Artifact, artifacts: Artifacts) -> tuple[str, ...]:
    """Locations of the feature files of a finished answers artifact, in shard order."""
    names = sorted(name for name in artifact.manifest["files"] if name.startswith("features-"))
    return tuple(artifacts.location(artifact, name) for name in names)


def encode_prompts(prompts: Sequence[Prompt]) -> str:
    """Prompts as one JSON text, which is what a row of Ray Data carries without guessing at nested types."""
    return json.dumps([asdict(prompt) for prompt in prompts])


def decode_prompts(text: str) -> list[Prompt]:
    """Inverse of `encode_prompts`."""
    return [Prompt(**{**fields, "messages": tuple(fields["messages"])}) for fields in json.loads(text)]
