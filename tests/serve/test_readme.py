"""The README's clients, as they stand there, at the real endpoint."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.served import Served

pytestmark = pytest.mark.ray

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Serve\n")[2].partition("\n## ")[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", SECTION, re.DOTALL | re.MULTILINE)


def at(served: Served, source: str) -> str:
    """The example with this endpoint's address and a target of this family."""
    assert "localhost:8000" in source
    return (
        source.replace("http://localhost:8000", served.url)
        .replace("localhost:8000", served.url.removeprefix("http://"))
        .replace('"legal', '"adapted')
    )


def test_the_examples_are_sync_async_streamed_and_pinned() -> None:
    sources = "\n".join(blocks("python"))
    for sign in ("OpenAI(", "AsyncOpenAI(", "stream=True", "legal@v1", "n=2"):
        assert sign in sources


@pytest.mark.parametrize("source", blocks("python"), ids=["sync", "async"])
def test_a_python_example_prints_an_answer(served: Served, source: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", at(served, source)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_examples_are_answered(served: Served) -> None:
    commands = [line for block in blocks("bash") for line in block.replace("\\\n", "").splitlines()]
    calls = [command for command in commands if command.startswith("curl ")]
    assert len(calls) == 2
    for call in calls:
        done = subprocess.run(
            ["bash", "-c", f"KEY=unused; {at(served, call)} --silent --show-error --fail"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert '"adapted"' in done.stdout
