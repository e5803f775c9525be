"""`farm`'s entry point sets its process up before libraries read the environment."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from farm.cli.main import app

PROGRAM = """
import atexit, os, sys
from farm.cli.main import main
atexit.register(lambda: print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules))
sys.argv = ["farm", "--help"]
main()
"""


def _last_line(environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()[-1]


def test_threads_give_way_before_torch_has_read_how_long_they_spin() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    assert _last_line(environment) == "1000 False"
    assert _last_line({**environment, "GOMP_SPINCOUNT": "7"}) == "7 False"


def test_the_version_is_that_of_the_installed_package() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"farm {version('farm')}\n")


def test_the_help_begins_where_a_new_user_does() -> None:
    """In a process of its own: another test may have registered some commands before the others."""
    code = (
        "from typer.main import get_command; from farm.cli.main import app; print(*get_command(app).commands)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = shown.stdout.split()
    wanted = ["demo", "finetune", "train-trunk", "onboard", "probe", "serve", "export", "bench"]
    assert [name for name in names if name in wanted] == wanted


@pytest.mark.parametrize("words", [["probe"], ["bench", "decode"], ["serve"]])
def test_the_usage_marks_a_manifest_that_may_be_left_out_once(words: list[str]) -> None:
    shown = CliRunner().invoke(app, [*words, "--help"]).output
    assert "[MANIFEST]" in shown
    assert "[[" not in shown


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    nested = getattr(command, "commands", None)
    if nested is None:
        yield name, command
    for word, one in (nested or {}).items():
        yield from _commands(one, f"{name} {word}")


def test_every_command_says_what_it_and_each_of_its_parameters_is() -> None:
    commands = list(_commands(get_command(app), "farm"))
    assert len(commands) > 20
    assert [name for name, command in commands if not command.help] == []
    silent = [f"{name} {one.name}" for name, command in commands for one in command.params if not one.help]
    assert silent == []
