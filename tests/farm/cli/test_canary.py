"""`farm registry canary`."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from farm.cli.main import app
from farm.errors import UserError
from farm.registry import Canary, Registry
from farm.store import open_store


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(open_store(str(tmp_path / "store")))
    for _ in range(3):
        registry.publish("legal", {}, {})
    assert registry.promote("legal", "v1", None)
    return registry


def canary(registry: Registry, *arguments: str) -> Result:
    command = ["registry", "canary", "legal", *arguments, "--store", registry.store.uri]
    return CliRunner().invoke(app, command, catch_exceptions=False)


def test_a_canary_is_started_and_ended(registry):
    assert "v2 gets 0.1" in canary(registry, "v2", "--share", "0.1").output
    assert registry.canary("legal") == Canary("v2", 0.1)
    with pytest.raises(UserError, match="v2 is tried already"):
        canary(registry, "v3", "--share", "0.1")
    assert "no canary any more" in canary(registry, "v2", "--end").output
    assert registry.canary("legal") is None
    assert "v2 is no canary" in canary(registry, "v2", "--end").output


@pytest.mark.parametrize("arguments", [("v2",), ("v2", "--share", "0.1", "--end")])
def test_a_canary_needs_either_a_share_or_an_end(registry, arguments):
    with pytest.raises(UserError, match="either --share"):
        canary(registry, *arguments)
