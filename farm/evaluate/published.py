"""Measures of what a store has published, on any prompts: the base draft against the target's live adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.artifacts import TRUNK, Artifacts
from farm.card import Fit, check_fit, parse_card, tokenizer_digest
from farm.config import Manifest, UserError
from farm.data.prompts import load_prompts
from farm.draft.checkpoint import EXPERT_FILE, TRUNK_FILE
from farm.evaluate.provenance import hardware
from farm.evaluate.target import EvaluateTask, evaluate_target
from farm.evaluate.templates import base_spec, with_templates
from farm.registry import Registry
from farm.sections import TargetSpec
from farm.store import open_store
from farm.target.load import load_tokenizer, placement

BASE = "base"


@dataclass(frozen=True)
class LiveExpert:
    """A target's live adapter: its version and card, and a local copy of its private expert."""

    version: str
    file: Path
    card: Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """The family that a store holds: its registry, and its trunk in a local folder with the base's private expert."""

    registry: Registry
    trunk_key: str
    trunk_folder: Path
    fit: Fit

    @classmethod
    def of(cls, uri: str) -> Published:
        """What the store at `uri` has published. Raises UserError when it holds no family, or lost its trunk."""
        store = open_store(uri)
        registry, artifacts = Registry(store), Artifacts(store)
        key = registry.family()["trunk_key"]
        trunk = artifacts.find(TRUNK, key)
        if trunk is None:
            raise UserError(f"{store.uri}: the family's trunk {key} is gone; run `farm onboard` again")
        digest = trunk.manifest["files"].get(TRUNK_FILE, {}).get("sha256")
        return cls(registry, key, artifacts.folder(trunk), Fit(trunk_key=key, trunk_digest=digest))

    @property
    def base_expert(self) -> Path:
        """The private expert that the trunk was trained with: beside it, the base's draft."""
        return self.trunk_folder / EXPERT_FILE

    def live_expert(self, target: str, model: str | None = None) -> LiveExpert | None:
        """None while the base draft serves, or when the live adapter was made for another trunk.

        UserError when it was made for other bytes of this trunk, or for another tokenizer than that of `model`.
        """
        live = self.registry.live(target)
        if live is None or live.card["trunk_key"] != self.trunk_key:
            return None
        tokenizer = None if model is None else tokenizer_digest(load_tokenizer(model).get_vocab())
        name = f"{target}@{live.version}"
        here = self.fit.model_copy(update={"tokenizer_digest": tokenizer})
        check_fit(name, parse_card(name, live.card), here)
        return LiveExpert(live.version, self.registry.path(live, EXPERT_FILE), live.card)


def evaluate_published(manifest: Manifest, target: str, prompts: str) -> dict[str, Any]:
    """The measured fields of a report row (records.TargetRow) for `target` on every prompt of a file.

    `base` measures the base with its own draft. Raises UserError when there is no such target, or when the store has
    no trunk of this family yet.
    """
    published = Published.of(manifest.store)
    spec = spec_of(with_templates(manifest), target)
    live = published.live_expert(target, spec.model) if target != BASE else None
    adapted = None if live is None else str(live.file)
    chosen = load_prompts(prompts).prompts
    trunk_folder = str(published.trunk_folder)
    row = evaluate_target(
        EvaluateTask(spec, manifest.evaluate, trunk_folder, adapted, None, chosen, manifest.dtype)
    )
    record = {
        "k": manifest.evaluate.k,
        "temperature": manifest.evaluate.temperatures[0],
        "prompts": len(chosen),
        "prompts_file": prompts,
        "adapter_version": None if live is None else live.version,
        "dtype": placement(manifest.dtype)[0],
        "hardware": hardware(),
    }
    return {**record, **row}


def spec_of(manifest: Manifest, name: str) -> TargetSpec:
    """The target of a manifest, or its base as one; UserError when there is neither of that name."""
    for spec in manifest.targets:
        if spec.name == name:
            return spec
    if name == BASE:
        return base_spec(manifest, BASE)
    names = ", ".join([BASE, *(spec.name for spec in manifest.targets)])
    raise UserError(f"{name}: the manifest has no such target; choose one of {names}")
