"""Manifests of targets that ask twenty prompts each, and their plans, without any model."""

import json
from pathlib import Path

from farm.artifacts import Artifacts
from farm.config import Manifest
from farm.fleet.plan import make_plan
from farm.fleet.records import Plan
from farm.sections import TargetSpec
from farm.store import open_store


def digest_of(spec: TargetSpec) -> str:
    return f"digest of {spec.model}"


def manifest_of(root: Path, *names: str, **sections: object) -> Manifest:
    for name in names:
        lines = [json.dumps({"prompt": f"{name} {row}"}) for row in range(20)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    targets = tuple(TargetSpec(name=name, model=name, prompts=str(root / f"{name}.jsonl")) for name in names)
    sections = {"evaluate": {"prompts": 4}, "regenerate": {"shard_rows": 5}, **sections}
    return Manifest(base="base", store=(root / "store").as_uri(), targets=targets, **sections)


def plan_of(manifest: Manifest) -> Plan:
    return make_plan(manifest, Artifacts(open_store(manifest.store)), digest_of)
