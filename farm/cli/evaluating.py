"""The command that measures what was onboarded."""

from __future__ import annotations

from farm.cli.options import (
    ManifestPath,
    MeasuredTarget,
    MeasuresPath,
    Overrides,
    PromptsSource,
    app,
    keep_measures,
)
from farm.config import load_manifest


@app.command()
def evaluate(
    manifest: ManifestPath,
    target: MeasuredTarget,
    prompts: PromptsSource,
    out: MeasuresPath,
    overrides: Overrides = None,
) -> None:
    """Measure the base draft and the live adapter of a target on any prompts."""
    from farm.evaluate.published import evaluate_published

    keep_measures(evaluate_published(load_manifest(manifest, overrides or ()), target, prompts), out)
