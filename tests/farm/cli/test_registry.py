"""`farm registry`: what a store has, what a version is made of, what is live, what can go."""

import json

import pytest
from typer.testing import CliRunner

from farm.artifacts import Artifacts
from farm.cli.main import app
from farm.config import UserError
from farm.registry import Registry
from farm.store import open_store

CARD = {
    "trunk_key": "0123456789abcdef",
    "answers_key": "fedcba9876543210",
    "config": {"evaluate": {"temperatures": [0.0]}},
    "evaluation": {"tau_base_draft": 1.25, "tau_adapted": 3.5, "gain_interval": [2.0, 2.5]},
    "git_sha": "abc+",
    "library_versions": {"torch": "2.13.0"},
}


@pytest.fixture
def store(store_uri: str) -> str:
    """`math` with v1 live and v2 beside it; `code` with nothing."""
    registry = Registry(open_store(store_uri))
    for _ in range(2):
        registry.publish("math", {"expert.safetensors": b"1234"}, CARD)
    assert registry.promote("math", "v1", None)
    registry.put_family({"trunk_key": "0123456789abcdef", "targets": {"math": {}, "code": {}}})
    return store_uri


def run(*words: str) -> str:
    done = CliRunner().invoke(app, ["registry", *words], env={"COLUMNS": "120"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


def test_versions_are_listed_promoted_and_rolled_back(store):
    assert run("list", "--store", store).split() == ["code", "base", "draft", "math", "v1", "(live),", "v2"]
    assert "v2 is live" in run("promote", "math", "v2", "--store", store)
    assert "v1, v2 (live)" in run("list", "--store", store)
    assert "v1 is live again" in run("rollback", "math", "--store", store)
    run("canary", "math", "v2", "--share", "0.25", "--store", store)
    assert "v1 (live), v2 (canary, 0.25)" in run("list", "--store", store)
    Registry(open_store(store)).end_canary("math", "v2", "worse")
    assert "v1 (live), v2 (rolled back: worse)" in run("list", "--store", store)
    run("canary", "math", "v2", "--share", "0.5", "--store", store)
    run("canary", "math", "v2", "--end", "--store", store)
    assert "v1 (live), v2\n" in run("list", "--store", store)
    run("canary", "math", "v2", "--share", "0.5", "--store", store)
    Registry(open_store(store)).end_canary("math", "v2", "cannot be loaded: [/tmp/x]")
    assert "v2 (rolled back: cannot be loaded: [/tmp/x])" in run("list", "--store", store)
    with pytest.raises(UserError, match="no version v9"):
        run("promote", "math", "v9", "--store", store)


def test_json_of_a_store_is_its_pointers_and_of_a_version_its_card(store):
    run("canary", "math", "v2", "--share", "0.25", "--store", store)
    code, math = json.loads(run("list", "--json", "--store", store))
    assert (code["target"], code["versions"], code["live"]) == ("code", [], None)
    assert (math["versions"], math["live"], math["history"]) == (["v1", "v2"], "v1", ["v1"])
    assert math["canary"] == {"version": "v2", "share": 0.25}
    card = json.loads(run("show", "math@v2", "--json", "--store", store))
    assert card == Registry(open_store(store)).version("math", "v2").card
    assert card["evaluation"]["tau_adapted"] == 3.5


def test_a_reason_is_listed_as_it_was_written_and_on_one_line(store):
    run("canary", "math", "v2", "--share", "0.25", "--store", store)
    reason = f"[/tmp/{'x' * 120}] cannot be read"
    Registry(open_store(store)).end_canary("math", "v2", reason)
    assert f"v1 (live), v2 (rolled back: {reason})\n" in run("list", "--store", store)


def test_a_card_is_shown_as_a_table_for_the_live_version_or_a_named_one(store):
    shown = run("show", "math", "--store", store)
    for part in (
        "math@v1 (live)",
        "1.250",
        "3.500",
        "2.000 to 2.500",
        "fedcba9876543210",
        "abc+",
        "torch 2.13.0",
    ):
        assert part in shown
    assert "math@v2" in run("show", "math@v2", "--store", store)
    with pytest.raises(UserError, match="choose one of v1, v2"):
        run("show", "math@v3", "--store", store)
    with pytest.raises(UserError, match="no published version"):
        run("show", "code", "--store", store)


def test_a_dry_run_says_what_would_go_and_how_many_bytes_and_deletes_nothing(store):
    Artifacts(open_store(store)).put_file("answers", "old", "shard", b"x" * 2_000_000)
    before = open_store(store).list("")
    assert "0 would go" in run("gc", "--dry-run", "--store", store)  # all is younger than a week
    planned = run("gc", "--dry-run", "--grace", "0", "--store", store)
    assert "math@v2" in planned
    assert "2.0 MB" in planned
    assert "2 would go, 2.0 MB" in planned
    assert open_store(store).list("") == before
    assert "2 deleted, 2.0 MB" in run("gc", "--grace", "0", "--store", store)
    assert "math@v2" not in run("list", "--store", store)
    assert "v1 (live)" in run("list", "--store", store)
    assert "0 would go" in run("gc", "--dry-run", "--grace", "0", "--store", store)
