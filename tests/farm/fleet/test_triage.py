"""Triage of a tiny family for real: probes are kept, a misfit is refused alone, the plan prints the same line."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from farm.artifacts import Artifacts
from farm.cli.main import app
from farm.config import UserError, dump
from farm.evaluate.records import TargetRow
from farm.fleet.plan import make_plan
from farm.fleet.triage import planned_lines, triage
from farm.store import open_store
from farm.target.load import target_digest
from tests.farm.evaluate.reports import put_report
from tests.farm.fleet.family import Family


def files(store: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def test_a_probe_is_kept_and_a_second_look_runs_nothing(family: Family, store: Path) -> None:
    manifest = family.manifest("alpha", store=store)
    seen: list[tuple[str, int, int]] = []
    first = triage(manifest, prompts=4, progress=lambda *args: seen.append(args))
    (verdict,) = first.verdicts
    assert seen == [("alpha", 1, 2), ("", 2, 2)]
    assert verdict.seen.tau_interval is not None
    assert verdict.seen.tau_interval[0] <= verdict.seen.tau <= verdict.seen.tau_interval[1]
    assert verdict.seen.alpha is not None
    assert 0 <= verdict.seen.alpha <= 1
    assert verdict.seen.plain_s is not None
    assert 0 < verdict.seen.plain_s < 1
    assert [offer.tier for offer in verdict.offers] == ["low-rank", "expert", "full"]
    before = files(store)
    assert triage(manifest, prompts=4) == first
    assert files(store) == before
    assert triage(manifest, prompts=3).verdicts[0].seen != verdict.seen  # other prompts, another probe


def test_a_target_that_is_no_member_of_the_family_is_refused_alone(family: Family, store: Path) -> None:
    family.target("wide", hidden_size=32)
    found = triage(family.manifest("alpha", "wide", store=store), prompts=2)
    assert [verdict.target for verdict in found.verdicts] == ["alpha"]
    assert "hidden_size is 32" in found.refused["wide"]


def test_prompts_that_leave_no_room_are_the_users_to_shorten(family: Family, store: Path) -> None:
    manifest = family.manifest("alpha", store=store, probe={"max_new_tokens": 100_000})
    with pytest.raises(UserError, match=r"probe\.max_new_tokens"):
        triage(manifest, prompts=2)


def test_targets_that_are_all_refused_have_their_own_reasons(family: Family, store: Path) -> None:
    """Held-out prompts are theirs: without any, the base has none to be probed on."""
    manifest = family.manifest("alpha", store=store)
    moved = manifest.targets[0].model_copy(update={"prompts": str(store / "moved.jsonl")})
    found = triage(manifest.model_copy(update={"targets": (moved,)}))
    assert found.verdicts == ()
    assert "moved.jsonl" in found.refused["alpha"]


def test_a_selection_is_paid_for_by_the_answers_and_trained_on_what_it_chose(
    family: Family, store: Path
) -> None:
    """Taken for 8 answers of 8, sixteen would cost twice as much, and so would training on them."""
    manifest = family.manifest("alpha", store=store, select={"strategy": "random", "fraction": 0.5})
    row = TargetRow(
        name="alpha", kind="full", decision="kept", tau_base_draft=1.5, tau_adapted=3.5, rows=8, selected=0.5,
        finish_reasons={"stop": 16}, stage_seconds={"regenerate": 8.0, "adapt": 16.0},
        tokens_per_s_autoregressive=100.0, tokens_per_s_base_draft=100.0, adapter_version="v1",
    )  # fmt: skip
    opened = open_store(str(store))
    put_report(opened, row, k=2)
    artifacts = Artifacts(opened)
    (line,) = planned_lines(make_plan(manifest, artifacts, target_digest), artifacts)
    assert "adapting 24 s" in line


def test_without_a_trunk_there_is_nothing_to_probe_with(family: Family, store: Path) -> None:
    with pytest.raises(UserError, match="train-trunk"):
        triage(family.manifest("alpha", store=store, trunk=False))


def test_the_plan_prints_the_line_of_the_probe(family: Family, store: Path, tmp_path: Path) -> None:
    manifest = family.manifest("alpha", "beta", store=store)
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(dump(manifest)))
    plain = CliRunner().invoke(app, ["onboard", str(path), "--dry-run"])
    assert "alpha: not probed; `farm probe` says" in plain.output, plain.output
    probed = CliRunner().invoke(app, ["probe", str(path)])
    assert probed.exit_code == 0, probed.output
    planned = CliRunner().invoke(app, ["onboard", str(path), "--dry-run"])
    lines = [line for line in probed.output.splitlines() if line.startswith(("alpha: ", "beta: "))]
    assert len(lines) == 2
    assert all(line in planned.output for line in lines)
    assert "guesses: no past runs" in probed.output


def test_json_of_a_probe_is_its_verdicts_and_who_was_refused(
    family: Family, store: Path, tmp_path: Path
) -> None:
    family.target("wide", hidden_size=32)
    manifest = family.manifest("alpha", "wide", store=store)
    path = tmp_path / "manifest.yaml"
    path.write_text(yaml.safe_dump(dump(manifest)))
    done = CliRunner().invoke(app, ["probe", str(path), "--prompts", "2", "--json"])
    shown, found = json.loads(done.stdout), triage(manifest, prompts=2)
    assert shown == json.loads(json.dumps(asdict(found)))
    assert "hidden_size is 32" in shown["refused"]["wide"]


def test_an_earlier_evaluation_of_the_target_stands_in_for_a_probe(family: Family, store: Path) -> None:
    manifest = family.manifest("alpha", store=store)
    row = TargetRow(
        name="alpha", kind="full", decision="kept", tau_base_draft=1.5, tau_adapted=3.5, rows=16,
        stage_seconds={"regenerate": 8.0, "adapt": 16.0}, tokens_per_s_autoregressive=100.0,
        tokens_per_s_base_draft=100.0, adapter_version="v1",
    )  # fmt: skip
    opened = open_store(str(store))
    put_report(opened, row, k=2)
    artifacts = Artifacts(opened)
    (line,) = planned_lines(make_plan(manifest, artifacts, target_digest), artifacts)
    # two guesses of 0.85 and one measured 0.8 of the 2.5 that were lost
    assert line.startswith("alpha: expert: tau 1.50 -> 3.5")
    assert "adapting 24 s" in line
