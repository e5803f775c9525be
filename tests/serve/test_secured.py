"""`farm serve` as it is run: a process of its own with keys and limits, which ends politely when it is told to."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from farm.cli.serving import LEAN_SERVE
from farm.keys import add_key
from tests.serve.family import build_family
from tests.serve.served import HELLO, free_port

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
ENDS_WITHIN_S = 30


@dataclass(frozen=True)
class Secured:
    url: str
    process: "subprocess.Popen[bytes]"
    keys: dict[str, str]
    log: Path
    session: Path  # Ray's folder, with the logs of every process

    def client(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys.get(key, key), max_retries=0)

    def greedy(self, key: str, target: str = "legal", max_tokens: int | None = 8, **fields):
        return self.client(key).chat.completions.create(
            model=target, messages=HELLO, temperature=0, max_tokens=max_tokens, **fields
        )


@pytest.fixture(scope="module")
def secured(tmp_path_factory) -> Iterator[Secured]:
    """In a Ray of its own, as on a machine where none runs; nothing else would be ended by a signal."""
    root = tmp_path_factory.mktemp("secured")
    store = build_family(root, ("legal", "support"))
    keys_file = root / "keys"
    keys = {
        "all": add_key(keys_file, "all"),
        "one": add_key(keys_file, "one", ("legal",), max_new_tokens=9, max_concurrent=1),
        "brief": add_key(keys_file, "brief", ("legal",), max_prompt_tokens=12),
    }
    port, log = free_port(), root / "log"
    arguments = {"store": store, "port": port, "keys": keys_file, "num_slots": 4, "max_length": 4000}
    command = [sys.executable, "-m", "serve.foreground", *(f"{k}={v}" for k, v in arguments.items())]
    session = Path(tempfile.mkdtemp(prefix="ray"))  # short: paths of sockets have at most 107 characters
    dead_cluster = session / "ray" / "ray_current_cluster"  # as a head that was killed leaves it
    dead_cluster.parent.mkdir()
    dead_cluster.write_text("127.0.0.1:1")
    own_ray = {"RAY_TMPDIR": str(session), "RAY_AUTH_MODE": "disabled"}
    environment = {**LEAN_SERVE, **os.environ, **own_ray, "OMP_NUM_THREADS": "1"}  # as `farm serve` starts it
    environment.pop("RAY_ADDRESS", None)
    with log.open("wb") as sink:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=sink, stderr=subprocess.STDOUT)
    served = Secured(f"http://127.0.0.1:{port}", process, keys, log, session)
    try:
        wait_for_answer(served)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
        shutil.rmtree(session, ignore_errors=True)


def wait_for_answer(served: Secured) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end:
        assert served.process.poll() is None, served.log.read_text()[-3000:]
        try:
            if httpx.get(f"{served.url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(served.log.read_text()[-3000:])


def test_a_key_answers_for_its_targets_and_lists_no_others(secured):
    assert [model.id for model in secured.client("all").models.list()] == ["legal", "support"]
    assert [model.id for model in secured.client("one").models.list()] == ["legal"]
    assert secured.greedy("one").choices[0].message.content
    for name in ("support", "nobody"):
        with pytest.raises(openai.NotFoundError) as caught:
            secured.greedy("one", name)
        assert caught.value.body["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        secured.client("one").models.retrieve("support")


def test_without_a_key_nothing_is_told_but_health(secured):
    for call in (lambda: secured.greedy("wrong"), lambda: secured.client("wrong").models.list()):
        with pytest.raises(openai.AuthenticationError) as caught:
            call()
        assert caught.value.body["code"] == "invalid_api_key"
    assert httpx.get(f"{secured.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{secured.url}/readyz").json()["status"] == "ready"
    counted = httpx.get(f"{secured.url}/metrics").text
    assert 'farm_requests_total{status="401",target=""} 2.0' in counted


def test_limits_of_a_key_are_told_by_name(secured):
    with pytest.raises(openai.BadRequestError, match=r"max_tokens: 10 is more than the 9") as caught:
        secured.greedy("one", max_tokens=10)
    assert caught.value.body["param"] == "max_tokens"
    assert secured.greedy("one", max_tokens=None).usage.completion_tokens == 9
    with pytest.raises(openai.BadRequestError, match=r"n: 2 is more than the 1") as caught:
        secured.greedy("one", n=2)
    assert caught.value.body["param"] == "n"
    with pytest.raises(openai.APIStatusError, match="at most 12") as caught:
        secured.client("brief").completions.create(model="legal", prompt=[10] * 13)
    assert caught.value.status_code == 413
    assert secured.client("brief").completions.create(model="legal", prompt=[10] * 12).choices[0].text


def test_a_request_id_is_echoed_or_made_on_answers_and_errors(secured):
    def ids(path: str, **headers: str) -> list[str]:
        response = httpx.get(f"{secured.url}{path}", headers=headers)
        return response.headers.get_list("x-request-id")

    for path in ("/healthz", "/v1/models", "/v1/nothing"):
        assert ids(path, **{"X-Request-ID": "trace-7"}) == ["trace-7"]
        (first,), (second,) = ids(path), ids(path)
        assert first != second
    answer = secured.client("all").chat.completions.with_raw_response.create(
        model="legal", messages=HELLO, max_tokens=1, extra_headers={"X-Request-ID": "trace-8"}
    )
    assert answer.headers["x-request-id"] == "trace-8"


def test_told_to_end_it_finishes_open_answers_refuses_new_ones_and_logs_no_secret(secured):
    whole = secured.greedy("all", max_tokens=1200).choices[0].message.content
    stream = secured.greedy("all", max_tokens=1200, stream=True)
    pieces = [next(iter(stream)).choices[0].delta.content]
    secured.process.send_signal(signal.SIGTERM)
    with ThreadPoolExecutor() as pool:
        rest = pool.submit(lambda: [chunk.choices[0].delta.content for chunk in stream])
        statuses = [late(secured).status_code]
        while statuses[-1] == 200 and not rest.done():
            statuses.append(late(secured).status_code)
        assert not rest.done(), "the open answer ended before a new one was refused: ask for a longer one"
        refused = late(secured)
        pieces += rest.result(timeout=60)
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) >= 1
    assert "shutting down" in refused.json()["error"]["message"]
    assert "".join(pieces) == whole
    assert secured.process.wait(timeout=ENDS_WITHIN_S) == 0
    assert "ended" in secured.log.read_text().splitlines()[-1]
    assert_no_secret(secured)


def late(secured: Secured) -> httpx.Response:
    body = {"model": "legal", "messages": HELLO, "max_tokens": 1}
    headers = {"Authorization": f"Bearer {secured.keys['all']}"}
    return httpx.post(f"{secured.url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def assert_no_secret(secured: Secured) -> None:
    """In what the process wrote, and in all files of its Ray session, which do have the request ids."""
    files = [secured.log, *(path for path in secured.session.rglob("*") if path.is_file())]
    written = b"".join(path.read_bytes() for path in files)
    assert b"trace-8" in written, "the logs are not where this test looks"
    assert [name for name, secret in secured.keys.items() if secret.encode() in written] == []
