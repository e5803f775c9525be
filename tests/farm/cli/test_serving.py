"""What `farm serve` hands to the server, and `farm key new`."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from farm.cli.main import app
from farm.config import UserError
from farm.keys import digest, read_keys
from farm.sections import TreeSettings
from serve.plan import parse
from tests.serve.family import build_family

TARGET = {"name": "legal", "model": "base", "prompts": "base"}


def served_with(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """The arguments of the process that `farm serve` becomes."""
    became: list[list[str]] = []
    monkeypatch.setattr(os, "execve", lambda _path, command, _environment: became.append(command))
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert done.exit_code == 0, done.output
    (command,) = became
    assert command[:3] == [sys.executable, "-m", "serve.foreground"]
    return command[3:]


def test_the_settings_of_a_manifest_reach_the_server_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"base": "base", "store": "store", "targets": [TARGET]}))
    overrides: dict[str, Any] = {
        "serve.keys": "keys.jsonl",
        "serve.cors": "[https://a.example,https://b.example]",
        "serve.max_new_tokens": "50",
        "serve.num_slots": "3",
        "serve.control": "fixed",
        "serve.tree.kind": "sampled",
        "serve.tree.width": "2",
        "resources.serve.num_cpus": "2",
    }
    sets = [part for name, value in overrides.items() for part in ("--set", f"{name}={value}")]
    args = parse(served_with(monkeypatch, str(manifest), *sets))
    assert args.keys == str(tmp_path / "keys.jsonl")
    assert args.cors == ("https://a.example", "https://b.example")
    assert (args.max_new_tokens, args.max_prompt_tokens, args.num_slots) == (50, None, 3)
    assert args.settings.tree == TreeSettings(kind="sampled", width=2)
    assert args.num_cpus == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "serve.k=3"], "--set serve.k=3: sets a field of a manifest"),
        (["manifest.yaml", "--store", "elsewhere"], "--store elsewhere: the manifest names the store"),
    ],
)
def test_an_option_that_would_be_dropped_is_refused(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["serve", *arguments])
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


def test_a_store_alone_leaves_every_setting_at_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(served_with(monkeypatch, "--store", "s3://bucket/farm"))
    assert args.store == "s3://bucket/farm"
    assert (args.keys, args.cors, args.tree) == (None, (), None)


def test_a_key_is_printed_once_and_its_hash_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    arguments = [
        "key",
        "new",
        "alice",
        "--keys",
        str(path),
        "--targets",
        "legal, support",
        "--max-concurrent",
        "3",
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (key,) = read_keys(path)
    assert key.sha256 == digest(done.stdout.strip())
    assert (key.name, key.targets, key.max_concurrent) == ("alice", ("legal", "support"), 3)


def test_a_dry_run_shows_where_targets_go_and_starts_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    store = build_family(tmp_path, ("alpha", "beta"))
    done = CliRunner().invoke(app, ["serve", "--store", store, "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0
    shown = capfd.readouterr().out
    assert "EngineHost-0" in shown
    assert "alpha, beta" in shown
