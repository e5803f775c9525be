"""Measures of what a store has published, on any prompts: the base draft against the target's live adapter."""

from __future__ import annotations

from typing import Any

from farm.artifacts import TRUNK, Artifacts
from farm.config import Manifest, TargetSpec, UserError
from farm.data.prompts import load_prompts
from farm.draft.checkpoint import EXPERT_FILE
from farm.evaluate.provenance import hardware
from farm.evaluate.target import EvaluateTask, evaluate_target
from farm.registry import Registry
from farm.store import open_store
from farm.target.load import placement

BASE = "base"


def evaluate_published(manifest: Manifest, target: str, prompts: str) -> dict[str, Any]:
    """The measured fields of a report row (records.TargetRow) for `target` on every prompt of a file.

    `base` measures the base with its own draft. Raises UserError when there is no such target, or when the store has
    no trunk of this family yet.
    """
    store = open_store(manifest.store)
    registry, artifacts = Registry(store), Artifacts(store)
    trunk_key = registry.family()["trunk_key"]
    trunk = artifacts.find(TRUNK, trunk_key)
    if trunk is None:
        raise UserError(f"{store.uri}: the family's trunk {trunk_key} is gone; run `farm onboard` again")
    spec = _spec(manifest, target)
    live = registry.live(target) if target != BASE else None
    if live is not None and live.card["trunk_key"] != trunk_key:
        live = None
    adapted = None if live is None else str(registry.path(live, EXPERT_FILE))
    chosen = load_prompts(prompts).prompts
    trunk_folder = str(artifacts.path(trunk, EXPERT_FILE).parent)
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


def _spec(manifest: Manifest, name: str) -> TargetSpec:
    for spec in manifest.targets:
        if spec.name == name:
            return spec
    if name == BASE:
        return TargetSpec(name=BASE, model=manifest.base, prompts="")
    names = ", ".join([BASE, *(spec.name for spec in manifest.targets)])
    raise UserError(f"--target {name}: the manifest has no such target; choose one of {names}")
