"""Promises of the tree itself: direction of imports, empty packages, what gets installed."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_imports_point_down_and_ray_stays_in_the_fleet():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", ["farm", "serve", "jobs"])
def test_importing_a_package_runs_nothing(package):
    files = list((ROOT / package).rglob("__init__.py"))
    assert files
    assert [file for file in files if file.read_text()] == []


def test_every_folder_of_the_library_with_code_is_a_package():
    folders = {
        file.parent for package in ("farm", "serve", "jobs") for file in (ROOT / package).rglob("*.py")
    }
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_only_the_library_is_installed():
    from setuptools import find_packages

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = find_packages(str(ROOT), **project["tool"]["setuptools"]["packages"]["find"])
    assert found
    assert {name.split(".")[0] for name in found} == {"farm"}


@pytest.mark.parametrize("file", ["constraints.txt", "vllm-requirements.txt"])
def test_constraints_pin_everything_exactly_and_hold_no_cuda(file):
    lines = (ROOT / file).read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 and "@" not in line and "/" not in line for line in pins)
    assert not [line for line in pins if line.startswith(("nvidia", "cuda", "triton", "farm"))]
