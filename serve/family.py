"""What a store says is to be served: its targets, the trunk once, and each target's draft."""

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from farm.artifacts import TRUNK, Artifacts
from farm.card import Fit, check_fit, parse_card, tokenizer_digest, vocabulary_digest
from farm.data.chat import read_template
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE, load_adapter, load_draft
from farm.draft.delta import TrunkDelta
from farm.draft.expert import Expert
from farm.draft.lean import FusedExpert
from farm.draft.model import Draft
from farm.draft.trunk import Trunk
from farm.errors import UserError, is_denied, is_unusable
from farm.registry import Pointer, Registry, RolledBack, Version
from farm.sections import Dtype, TargetSpec
from farm.store import open_store
from farm.target.load import LoadedTarget, load_target, resolve_dtype, stop_ids
from farm.target.lora import open_beside

Module = TypeVar("Module", Trunk, Expert, TrunkDelta)
log = logging.getLogger("ray.serve")
LOAD_ERRORS = (ValueError, KeyError, OSError, RuntimeError)  # with UserError and NotFound
BASE_DRAFT, PLAIN = "base", "plain"


@dataclass(frozen=True)
class SharedTrunk:
    key: str
    trunk: Trunk
    base_expert: Expert
    fit: Fit


@dataclass(frozen=True)
class ServedDraft:
    """What proposes for a target. `version`: the adapter's ("v3"), BASE_DRAFT, or PLAIN for none at all."""

    version: str
    draft: Draft | None
    reason: str = ""  # why it is no adapter: BASE_DRAFT, or PLAIN and what is wrong

    @classmethod
    def plain(cls, reason: str) -> "ServedDraft":
        return cls(PLAIN, None, f"{PLAIN}: {reason}")


class Family:
    """The family of one store, or `only` some of its targets. Raises UserError when the store holds none."""

    def __init__(
        self, store: str, dtype: Dtype | None = None, device: str = "cpu", only: Collection[str] | None = None
    ) -> None:
        opened = open_store(store)
        self._registry, self._artifacts = Registry(opened), Artifacts(opened)
        self._record = self._registry.family()
        self._dtype = resolve_dtype(dtype or self._record.get("dtype", "auto"), device)
        self._device = device
        self._only = self._record["targets"].keys() if only is None else only
        self._no_trunk = ""  # why there is none
        self.trunk = self._load_trunk()

    def targets(self) -> Iterator[LoadedTarget]:
        """Load the targets one by one; one that cannot be loaded is left out, with its reason in the log.

        A store that is unusable is raised: the replica starts again, and may then have all of them. One that denies a
        checkpoint costs its target alone.
        A checkpoint that several targets have in common is loaded once; their LoRAs lie beside it.
        """
        found = sorted(self._record["targets"].items())
        specs = [self._spec(name, fields) for name, fields in found if name in self._only]
        shared = {model for model, count in Counter(spec.model for spec in specs).items() if count > 1}
        checkpoints: dict[str, LoadedTarget] = {}
        for spec in specs:
            try:
                yield self._open(spec, checkpoints) if spec.model in shared else self._load(spec)
            except LOAD_ERRORS as error:
                if is_unusable(error) and not is_denied(error):
                    raise
                log.error("%s is not served: %s", spec.name, error)

    def _open(self, spec: TargetSpec, checkpoints: dict[str, LoadedTarget]) -> LoadedTarget:
        if spec.model not in checkpoints:
            checkpoints[spec.model] = self._load(spec.model_copy(update={"lora": None}))
        checkpoint = checkpoints[spec.model]
        if spec.lora is not None:
            return open_beside(spec, checkpoint) or self._load(spec)
        return replace(
            checkpoint, name=spec.name, chat_template=read_template(spec.chat_template),
            stop_ids=stop_ids(spec, checkpoint.config, checkpoint.tokenizer),
        )  # fmt: skip

    def _load(self, spec: TargetSpec) -> LoadedTarget:
        return load_target(spec, dtype=self._dtype, device=self._device)

    def pointer(self, target: str) -> Pointer:
        """Which versions are to serve now."""
        return self._registry.pointer(target)

    def version(self, target: str, version: str) -> Version:
        """A published version; UserError when the store has none of that name."""
        return self._registry.version(target, version)

    def roll_back(self, target: str, canary: RolledBack) -> bool:
        """Roll a canary back for all replicas; whether this call did."""
        return self._registry.end_canary(target, canary.version, canary.reason)

    def fits(self, live: Version | None) -> bool:
        """Whether a version was adapted on the trunk that is served; else it is of no use here."""
        return live is None or self.trunk is None or live.card.get("trunk_key") == self.trunk.key

    def draft(self, target: LoadedTarget, live: Version | None) -> ServedDraft:
        """The draft of a version, over the shared trunk. Raises UserError when it cannot be loaded."""
        if self.trunk is None:
            return ServedDraft.plain(self._no_trunk)
        config, forward = self.trunk.trunk.config, target.forward
        if (config.hidden_size, config.vocab_size) != (forward.hidden_size, forward.vocab_size):
            raise UserError(
                f"{target.name}: hidden size {forward.hidden_size} and vocabulary {forward.vocab_size} "
                f"do not fit the trunk's {config.hidden_size} and {config.vocab_size}"
            )
        if live is None:
            return ServedDraft(BASE_DRAFT, Draft(self.trunk.trunk, self.trunk.base_expert), BASE_DRAFT)
        name = f"{target.name}@{live.version}"
        tokenizer = tokenizer_digest(target.tokenizer.get_vocab())
        here = self.trunk.fit.model_copy(update={"tokenizer_digest": tokenizer})
        check_fit(name, parse_card(name, live.card), here)
        expert, delta = load_adapter(config, self._registry.path(live, EXPERT_FILE))
        placed = None if delta is None else self._placed(delta)
        return ServedDraft(live.version, Draft(self.trunk.trunk, self._fused(expert), placed))

    def _load_trunk(self) -> SharedTrunk | None:
        try:
            return self._read_trunk(str(self._record["trunk_key"]))
        except LOAD_ERRORS as error:
            if is_unusable(error):
                raise
            self._no_trunk = f"the trunk cannot be loaded: {error}"
            log.error("every target is decoded plainly: %s", self._no_trunk)
            return None

    def _read_trunk(self, key: str) -> SharedTrunk:
        artifact = self._artifacts.find(TRUNK, key)
        if artifact is None:
            raise UserError(f"trunk {key} is not in this store; run `farm onboard` again")
        draft = load_draft(self._artifacts.folder(artifact))
        kept = draft.trunk.vocabulary_C
        fit = Fit(
            trunk_key=key,
            trunk_digest=artifact.manifest["files"][TRUNK_FILE]["sha256"],
            hidden_size=draft.trunk.config.hidden_size,
            vocab_size=draft.trunk.config.vocab_size,
            vocabulary_digest=vocabulary_digest(None if kept is None else kept.tolist()),
        )
        return SharedTrunk(key, self._placed(draft.trunk), self._fused(draft.expert), fit)

    def _fused(self, expert: Expert) -> Expert:
        """Placed, in the forms that batches need: made here, so that no step waits for a new version's."""
        placed = self._placed(expert)
        placed.fused = FusedExpert.of(placed)
        return placed

    def _placed(self, module: Module) -> Module:
        return module.to(device=self._device, dtype=getattr(torch, self._dtype)).requires_grad_(False).eval()

    def _spec(self, name: str, fields: dict[str, str | None]) -> TargetSpec:
        return TargetSpec.model_validate({**fields, "name": name, "prompts": ""})
