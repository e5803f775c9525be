"""What commands and jobs share: a mistake ends them alike, and measures are kept whole."""

import json
from pathlib import Path

import pytest

from farm.cli.options import keep_measures, mistakes_exit, say
from farm.config import UserError


def test_a_mistake_is_one_unwrapped_line_on_stderr_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A long path or text in square brackets comes through as it is."""
    message = f"[red]/{'x' * 300}/manifest.yaml: does not exist"
    with pytest.raises(SystemExit) as ended, mistakes_exit():
        raise UserError(message)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_a_line_keeps_its_brackets_and_is_not_folded(capsys: pytest.CaptureFixture[str]) -> None:
    """Reasons name paths and shapes: read as markup, some would vanish and a closing one would end the run."""
    text = f"alpha: refused: /data/[v2]/{'x' * 200} [/gone]"
    say(text)
    assert capsys.readouterr().out == f"{text}\n"


def test_an_error_of_the_program_is_not_taken_for_a_mistake() -> None:
    with pytest.raises(KeyError), mistakes_exit():
        raise KeyError("ours")


def test_measures_are_written_whole_and_those_that_decide_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "measures.json"
    keep_measures({"tau_base_draft": 1.4567, "tau_adapted": None, "alpha": [0.5]}, out)
    assert json.loads(out.read_text()) == {"tau_base_draft": 1.4567, "tau_adapted": None, "alpha": [0.5]}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [["tau_base_draft", "1.457"], [str(out)]]
