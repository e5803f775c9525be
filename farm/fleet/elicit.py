"""Prompts of targets that come without any, before the plan: one Ray task a target, one artifact of its prompts."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import ray
from pydantic import SecretStr

from farm.artifacts import Artifact, Artifacts
from farm.config import Manifest
from farm.data.chat import TEXT_TEMPLATE
from farm.fleet.answers import endpoint_key
from farm.fleet.plan import Digest
from farm.fleet.pool import cause_of, run_bounded
from farm.fleet.stage_keys import PROMPTS, PROMPTS_FILE, elicit_key
from farm.sections import Dtype, ElicitSettings, RegenerateSettings, TargetSpec
from farm.store import open_store

AT_ONCE = 2


def elicitation_lines(manifest: Manifest, artifacts: Artifacts, digest: Digest) -> list[str]:
    """For the plan: how many prompts each target without any has made up, or will, and from what."""
    lines = []
    for spec, key in _without_prompts(manifest, digest):
        found = artifacts.find(PROMPTS, key)
        source = (
            "BOS token, as it has no chat template"
            if spec.chat_template == TEXT_TEMPLATE
            else "chat template"
        )
        will = f"no prompts given: {manifest.elicit.prompts} will be sampled from its {source}"
        lines.append(f"{spec.name}: {will if found is None else summary(found)}")
    return lines


def _without_prompts(manifest: Manifest, digest: Digest) -> Iterator[tuple[TargetSpec, str]]:
    """Targets without prompts, and the keys of those that they make up; the plan refuses what cannot be read."""
    for spec in manifest.targets:
        if not spec.prompts:
            with suppress(ValueError, OSError):
                yield spec, elicit_key(manifest, spec, digest(spec))


def elicit_prompts(
    manifest: Manifest, artifacts: Artifacts, digest: Digest, say: Callable[[str], None]
) -> dict[str, str]:
    """Have every target without prompts make some up, unless the store has them; {target name: why it could not}."""
    specs, failures = {}, {}
    for spec, key in _without_prompts(manifest, digest):
        if artifacts.find(PROMPTS, key) is None:
            settings, secret = (manifest.elicit, manifest.regenerate), endpoint_key(manifest.regenerate)
            specs[spec.name] = (artifacts.store.uri, key, spec, settings, manifest.dtype, secret)

    def started(name: str) -> None:
        say(f"{name}: has no prompts, it makes up {manifest.elicit.prompts}")

    num_gpus = manifest.resources.regenerate.num_gpus
    for outcome in run_bounded(specs, elicit, AT_ONCE, started, num_gpus=num_gpus):
        if outcome.error is not None:
            failures[outcome.name] = f"no prompts could be made up: {cause_of(outcome.error)}"
        else:
            say(f"{outcome.name}: {summary(outcome.value)}")
    return failures


def summary(artifact: Artifact) -> str:
    """One line: how many prompts, out of what, and what was rejected."""
    made = artifact.manifest
    rejected = ", ".join(f"{count} {reason}" for reason, count in made["rejected"].items())
    return f"{made['prompts']} prompts from its {made['source']}; rejected: {rejected or 'none'}"


@ray.remote(num_cpus=1, max_retries=1)
def elicit(
    store: str,
    key: str,
    spec: TargetSpec,
    settings: tuple[ElicitSettings, RegenerateSettings],
    dtype: Dtype,
    endpoint_key: SecretStr | None,
) -> Artifact:
    """Sample one target's prompts and keep them as rows of a .jsonl file."""
    from farm.decode.elicit import elicit_from
    from farm.decode.endpoint import Endpoint
    from farm.target.load import open_target

    started, (own, regenerate) = time.monotonic(), settings
    endpoint = None if regenerate.engine == "farm" else Endpoint.of(spec, regenerate, endpoint_key)
    opening, found = elicit_from(open_target(spec, dtype), own, regenerate, endpoint)
    lines = [
        json.dumps({"id": f"elicited-{row}", "prompt": text, "source": "elicited"})
        for row, text in enumerate(found.prompts)
    ]
    artifacts = Artifacts(open_store(store))
    files = {PROMPTS_FILE: "".join(f"{line}\n" for line in lines).encode()}
    manifest = {
        "target": spec.name,
        "prompts": len(lines),
        "rejected": found.rejected,
        "source": "chat template" if opening.end else "BOS token",
        "seconds": time.monotonic() - started,
    }
    return artifacts.write(PROMPTS, key, files, manifest)
