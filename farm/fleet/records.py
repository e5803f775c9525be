"""What is planned for each target and for the trunk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from farm.config import Manifest
from farm.data.prompts import Prompt
from farm.fleet.answers import AnswersJob
from farm.sections import TargetSpec


@dataclass(frozen=True)
class TargetPlan:
    """One target's way: its answers, the key of its private expert, the rows kept for the evaluation."""

    spec: TargetSpec
    digest: str  # sha256 of the checkpoint's files
    answers: AnswersJob  # with `select.before` to all prompts until their selection is in the store
    held_out: tuple[Prompt, ...]
    held_out_digest: str
    adapt_key: str
    reused: tuple[str, ...]  # stages whose artifact is in the store
    select_key: str | None = None  # of the rows that are adapted on, or answered at all; None: all
    origins: Mapping[int, str] = field(default_factory=dict)  # of the prompts' rows

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def kind(self) -> str:
        return "lora" if self.spec.lora else "full"


@dataclass(frozen=True)
class TrunkPlan:
    """Where the trunk comes from: the store, a given folder that is copied into it, or training."""

    key: str
    base: TargetSpec
    base_digest: str
    folder: Path | None  # the given trunk; None: trained
    answers: AnswersJob | None  # the base's own answers; None when nothing is to be trained
    held_out: tuple[Prompt, ...]  # not seen by the trunk: for the base draft's tau on the base
    reused: bool


@dataclass(frozen=True)
class Plan:
    manifest: Manifest
    trunk: TrunkPlan
    targets: tuple[TargetPlan, ...]  # those that can be planned, in the manifest's order
    refused: dict[str, str]  # target name -> why not
