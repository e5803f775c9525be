"""Fixtures of the fleet's tests."""

from pathlib import Path

import pytest

from tests.farm.fleet.family import Family


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(tmp_path_factory.mktemp("family"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"
