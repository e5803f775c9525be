"""An endpoint's answers as token ids: what other servers say is read, and trouble names the URL and the target.

The replies have the shape of vLLM's and SGLang's; `tests/serve/test_regenerate.py` asks the project's own endpoint.
"""

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from pydantic import SecretStr

from farm.bench.vllm_engine import environment, find_python
from farm.config import Refused
from farm.data.prompts import Prompt
from farm.decode.endpoint import Answered, Endpoint, ask_all, check
from farm.decode.engine import Request
from farm.decode.regenerate import regenerate_rows
from farm.decode.sampling import SamplingParams
from farm.sections import RegenerateSettings, TargetSpec
from farm.target import zoo
from farm.target.load import load_target
from tests.farm.models import tiny_model

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]
STOP = 9


@contextmanager
def replying(reply: Reply) -> Iterator[Endpoint]:
    """An HTTP server that answers a request's body by `reply(body)`: status and JSON."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = reply(body | {"key": self.headers["Authorization"]})
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        yield Endpoint("legal", url, "legal-7b", 4, 3, 10.0, SecretStr("s3cret"))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(**choice: Any) -> dict[str, Any]:
    fields = {"index": 0, "text": "", "finish_reason": "stop", **choice}
    return {
        "id": "c",
        "object": "text_completion",
        "created": 1,
        "model": "legal-7b",
        "choices": [fields],
    }


def request(*ids: int) -> Request:
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=2**55, max_new_tokens=5)
    return Request("0", ids, params)


def answers(reply: Reply, *requests: Request) -> list[Answered]:
    with replying(reply) as endpoint:
        return ask_all(endpoint, requests or [request(1, 2)], {STOP})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        # vLLM
        ({"token_ids": [3, 4, STOP], "stop_reason": None}, Answered((3, 4, STOP), "stop")),
        # SGLang
        ({"token_ids": [3, 4, STOP], "matched_stop": STOP}, Answered((3, 4, STOP), "stop")),
        # the stop token left out of the ids, but named
        ({"token_ids": [3, 4], "matched_stop": STOP}, Answered((3, 4, STOP), "stop")),
        # a server that knows fewer stop tokens goes on behind one
        ({"token_ids": [3, STOP, 4], "finish_reason": "length"}, Answered((3, STOP), "stop")),
        ({"token_ids": [3, 4, 5, 6, 7], "finish_reason": "length"}, Answered((3, 4, 5, 6, 7), "length")),
    ],
)
def test_an_answer_ends_with_the_targets_first_stop_token_whoever_serves_it(choice, expected) -> None:
    (found,) = answers(lambda body: (200, said(prompt_token_ids=body["prompt"], **choice)))
    assert found == expected


def test_an_answer_that_ends_otherwise_is_an_error_of_its_row() -> None:
    (found,) = answers(lambda body: (200, said(token_ids=[3], finish_reason="content_filter")))
    assert found.error == "it ended by 'content_filter' without a stop token of the target"
    (found,) = answers(lambda body: (200, said(token_ids=[3], stop_reason="</answer>")))
    assert "without a stop token" in (found.error or "")


def test_the_request_has_the_rows_own_sampling_and_none_of_the_servers() -> None:
    seen: list[dict[str, Any]] = []

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        seen.append(body)
        return 200, said(token_ids=[STOP])

    answers(reply)
    (body,) = seen
    assert body["key"] == "Bearer s3cret"
    assert (body["model"], body["prompt"], body["max_tokens"]) == ("legal-7b", [1, 2], 5)
    assert (body["temperature"], body["top_p"], body["seed"]) == (0.7, 0.9, 2**55)
    assert (body["repetition_penalty"], body["min_p"], body["return_token_ids"]) == (1.0, 0.0, True)
    assert body["top_k"] >= 2**20


def test_answers_keep_their_order_and_never_more_are_under_way_than_asked_for() -> None:
    lock, open_now, most = threading.Lock(), 0, 0
    together = threading.Event()

    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        nonlocal open_now, most
        with lock:
            open_now += 1
            most = max(most, open_now)
            if open_now == 4:
                together.set()
        together.wait(5)
        with lock:
            open_now -= 1
        return 200, said(token_ids=[body["prompt"][0], STOP])

    found = answers(reply, *(request(number) for number in range(20, 32)))
    assert [one.tokens[0] for one in found] == list(range(20, 32))
    assert most == 4


def test_a_server_that_is_busy_for_a_moment_is_asked_again() -> None:
    statuses = [503, 429]
    (found,) = answers(
        lambda body: (
            (statuses.pop(), {"error": {"message": "busy"}}) if statuses else (200, said(token_ids=[STOP]))
        )
    )
    assert (found, statuses) == (Answered((STOP,), "stop"), [])


def test_a_request_that_the_server_finds_wrong_fails_alone_but_not_where_all_would() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if len(body["prompt"]) > 2:
            return 400, {"error": {"message": "too long for 2048 positions"}}
        return 200, said(token_ids=[STOP])

    long, short = answers(reply, request(1, 2, 3), request(1))
    assert long.error == "the endpoint refuses the request: too long for 2048 positions"
    assert short.error is None
    with replying(reply) as endpoint:
        check(endpoint, (1, 2))
        with pytest.raises(Refused, match="legal: http.*too long"):
            check(endpoint, (1, 2, 3))


@pytest.mark.parametrize(
    ("status", "answer", "told"),
    [
        (200, said(), "returns no token ids.*engine: farm"),
        (200, said(token_ids=[STOP], prompt_token_ids=[7]), "another prompt"),
        (
            404,
            {"error": {"message": "no such model"}},
            "no such model; it does not serve 'legal-7b'.*served_as",
        ),
        (401, {"error": {"message": "bad key s3cret"}}, r"bad key \*\*\*; set regenerate.api_key_env"),
        (500, {"error": {"message": "out of memory"}}, "out of memory, after 2 attempts"),
    ],
)
def test_what_would_fail_every_row_is_refused_with_url_and_target(status, answer, told) -> None:
    with replying(lambda body: (status, answer)) as endpoint:
        asked = Endpoint("legal", endpoint.url, endpoint.model, 4, 1, 10.0, endpoint.key)
        with pytest.raises(Refused, match=f"legal: {endpoint.url}: .*{told}") as raised:
            ask_all(asked, [request(1), request(2)], {STOP})
    assert "s3cret" not in str(raised.value)
    assert "s3cret" not in repr(asked)


def test_a_server_that_is_not_there_is_refused_after_the_last_attempt() -> None:
    endpoint = Endpoint("legal", "http://127.0.0.1:9/v1", "legal", 4, 1, 10.0)
    with pytest.raises(Refused, match="legal: http://127.0.0.1:9/v1: no answer after 2 attempts"):
        ask_all(endpoint, [request(1)], {STOP})


@pytest.mark.vllm
def test_vllm_gives_the_greedy_rows_that_the_target_gives_here(tmp_path: Path) -> None:
    model = tiny_model(vocab=1024, hidden=128, head_dim=32)
    model.generation_config.repetition_penalty = 1.5  # vLLM would add it to every request by itself
    zoo.save(model, zoo.train_tokenizer(), tmp_path)
    spec = TargetSpec(name="tiny", model=str(tmp_path), prompts="", served_as="t")
    prompts = [
        Prompt(row, f"id{row}", ({"role": "user", "content": f"say {row}"},), None) for row in range(5)
    ]
    settings = RegenerateSettings(max_new_tokens=12, greedy_share=1.0)
    target = load_target(spec)
    with vllm_server(tmp_path) as url:
        asked = settings.model_copy(update={"engine": "openai", "url": url})
        found = regenerate_rows(target, prompts, settings, Endpoint.of(spec, asked, None))
    for theirs, ours in zip(found, regenerate_rows(target, prompts, settings), strict=True):
        assert replace(theirs, features=None) == replace(ours, features=None)
        torch.testing.assert_close(theirs.features, ours.features, atol=0.05, rtol=0.02)  # bf16


@contextmanager
def vllm_server(model: Path) -> Iterator[str]:
    """vLLM's own server, in its own environment; yields its /v1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = find_python()
    command = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--port",
        str(port),
    ]
    command += ["--served-model-name", "t", "--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    with (model / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, **environment(python, 1)}
        )
        try:
            wait_for(server, f"http://127.0.0.1:{port}/health", model / "server.log")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(60)


def wait_for(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise AssertionError(f"vLLM does not answer: {log.read_text()[-3000:]}")
