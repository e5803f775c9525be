"""A result names its commit, versions and machine, and leaves out what it cannot know."""

import subprocess
from pathlib import Path

import torch

from farm.evaluate.provenance import git_sha, hardware, versions


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_checkout_with_local_changes_is_marked(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a.txt").write_text("1")
    git(tmp_path, "add", "a.txt")
    git(tmp_path, "commit", "-q", "-m", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert git_sha(tmp_path) == head
    (tmp_path / "a.txt").write_text("2")
    assert git_sha(tmp_path) == head + "+"


def test_outside_a_checkout_there_is_no_commit(tmp_path: Path) -> None:
    assert git_sha(tmp_path) is None


def test_the_commit_of_a_project_that_an_environment_lies_in_is_not_ours(tmp_path: Path) -> None:
    """`pip install` into its .venv puts the package below a checkout that knows nothing of it."""
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "-q", "-m", "a project of somebody's own")
    package = tmp_path / ".venv" / "farm"
    package.mkdir(parents=True)
    (package / "provenance.py").write_text("")
    assert git_sha(package) is None
    assert git_sha(tmp_path) is not None


def test_the_libraries_and_the_machine_that_decide_a_result_are_named() -> None:
    assert {"python", "torch", "ray", "transformers"} <= set(versions())
    assert hardware()["cpu"]
    assert int(hardware()["cores"]) >= 1
    assert hardware()["vectors"] == torch.backends.cpu.get_cpu_capability()
