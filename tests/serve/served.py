"""The real Serve application on a tiny family, and how tests look into it."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import openai

HOSTED = ("adapted", "bare", "misfit", "moving")
MAX_LENGTH = 4000  # so long that an answer which nobody stops would be seen
HELLO = [{"role": "user", "content": "the quick brown fox"}]


@dataclass(frozen=True)
class Served:
    root: Path
    store: str
    url: str

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def greedy(self, target: str, max_tokens: int = 24, **fields) -> openai.types.chat.ChatCompletion:
        return self.client.chat.completions.create(
            model=target, messages=HELLO, temperature=0, max_tokens=max_tokens, **fields
        )


def hosted(target: str) -> list:
    from ray import serve

    engines = serve.get_deployment_handle("EngineHost-0", "farm").hosted.remote().result(timeout_s=10)
    return [engine for engine in engines if engine.target == target]


def wait_until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds until it was so."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "did not happen in time"
        time.sleep(0.05)
    return time.monotonic() - start


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
