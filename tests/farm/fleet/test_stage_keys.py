"""What decides an output is in its key, and what does not is left out."""

from dataclasses import asdict
from pathlib import Path

import pytest

from farm.artifacts import key_of
from farm.fleet.stage_keys import PROBE, probe_key
from farm.sections import ProbeSettings
from tests.farm.fleet.planned import manifest_of, plan_of


def test_how_often_a_checkpoint_is_written_changes_no_key(tmp_path: Path) -> None:
    before, after = (plan_of(manifest_of(tmp_path, "a", adapt={"save_every": n})) for n in (1, 2))
    assert before.targets[0].adapt_key == after.targets[0].adapt_key


@pytest.mark.parametrize(
    ("section", "setting"),
    [("adapt", "cached_bytes"), ("adapt", "micro_rows"), ("train_trunk", "micro_rows")],
)
def test_a_bound_and_how_a_step_is_cut_change_no_key(tmp_path: Path, section: str, setting: str) -> None:
    before, after = (
        plan_of(manifest_of(tmp_path, "a", **{section: settings})) for settings in ({}, {setting: 7})
    )
    assert before.trunk.key == after.trunk.key
    assert before.targets[0].adapt_key == after.targets[0].adapt_key


def test_what_a_probe_is_used_for_changes_no_key(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, "a")
    plan = plan_of(manifest)
    keys = {
        probe_key(manifest, plan.targets[0], ProbeSettings(skip_above=above), plan.trunk.key)
        for above in (None, 0.5, 0.9)
    }
    settings = {"prompts": 16, "max_new_tokens": 48, "skip_above": None}
    config = {"settings": settings, "k": manifest.evaluate.k, "dtype": "auto"}
    config["prompts"] = [asdict(prompt) for prompt in plan.targets[0].held_out]
    sampled = manifest_of(tmp_path, "a", evaluate={"prompts": 4, "temperatures": (0.7, 0.0)})
    assert probe_key(sampled, plan.targets[0], ProbeSettings(), plan.trunk.key) not in keys
    assert keys == {key_of(PROBE, config, [plan.targets[0].digest, plan.trunk.key])}, "that of older stores"
