"""The end of the endpoint in the foreground, without Serve."""

import signal
from collections.abc import Iterator

import pytest

from serve import foreground


@pytest.fixture
def handlers() -> Iterator[None]:
    """The process's own signal handlers afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_serve_is_shut_down_also_where_the_open_answers_cannot_be_waited_for(monkeypatch, capsys):
    done: list[str] = []

    def drain(wait_s: float) -> int:
        raise TimeoutError(f"no gateway answers within {wait_s:g} s")

    monkeypatch.setattr(foreground, "drain", drain)
    monkeypatch.setattr(foreground, "build", lambda args: args)
    monkeypatch.setattr(foreground.ray, "init", lambda **_: None)
    monkeypatch.setattr(foreground.serve, "run", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(foreground.serve, "shutdown", lambda: done.append("serve"))
    monkeypatch.setattr(foreground.ray, "shutdown", lambda: done.append("ray"))
    foreground.main(["store=nowhere", "drain_s=7"])
    assert done == ["serve", "ray"]
    assert "no gateway answers within 7 s" in capsys.readouterr().err
