"""Whatever is sent, the answer is a refusal of OpenAI's form, and the same replica answers afterwards."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serve.served import HELLO, Served, hosted

pytestmark = pytest.mark.ray

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
CHAT = {"model": "bare", "messages": HELLO, "max_tokens": 2, "temperature": 0}


@pytest.fixture(scope="module", autouse=True)
def unharmed(served: Served) -> Iterator[None]:
    """The same process gives the same answer after all of this."""
    before = served.greedy("bare"), hosted("bare")[0].pid
    yield
    assert served.greedy("bare").choices == before[0].choices
    assert hosted("bare")[0].pid == before[1]


@pytest.fixture(scope="module")
def document(served: Served) -> dict[str, Any]:
    return httpx.get(f"{served.url}/openapi.json").json()


def operations(document: dict[str, Any], *, briefly: bool) -> list[Any]:
    """The document's, with targets that are there; with answers short enough for many of them if `briefly`."""
    narrowed = json.loads(json.dumps(document))
    for name in ("ChatRequest", "TextRequest"):
        schema = narrowed["components"]["schemas"][name]
        schema["properties"]["model"] = {"enum": ["bare", "adapted", "adapted@v1"]}
        if briefly:
            names, values = {"pattern": "^[0-9]{1,2}$"}, {"type": "number", "maximum": 5, "minimum": -5}
            bias = {"type": "object", "propertyNames": names, "additionalProperties": values}
            schema["properties"]["logit_bias"] = bias
            schema["properties"]["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 3}
            schema["required"] = [*schema["required"], "max_tokens"]
            schema["properties"].pop("max_completion_tokens", None)
    found = [one.ok() for one in schemathesis.openapi.from_dict(narrowed).get_all_operations()]
    # The others have nothing in them that could be wrong.
    return found if briefly else [one for one in found if one.method == "post"]


@pytest.mark.parametrize("mode", GenerationMode)
def test_what_the_document_allows_and_what_it_does_not_is_answered_in_its_terms(
    document: dict[str, Any], served: Served, mode: GenerationMode
) -> None:
    """Every operation, by requests that the document allows, and by ones that it does not: those are all refused."""
    allowed, statuses = mode is GenerationMode.POSITIVE, Counter[int]()
    for operation in operations(document, briefly=allowed):

        @settings(
            max_examples=30 if operation.method == "post" else 3,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            checks = CHECKS if allowed else [*CHECKS, negative_data_rejection]
            statuses[case.call_and_validate(base_url=served.url, checks=checks, timeout=30).status_code] += 1

        ask()
    assert statuses[200] > 20 if allowed else set(statuses) <= {400, 404, 413}, statuses


def test_the_document_describes_what_is_served(document: dict[str, Any]) -> None:
    paths = document["paths"]
    assert {"/v1/models", "/v1/models/{name}", "/v1/chat/completions", "/v1/completions"} <= set(paths)
    chat = paths["/v1/chat/completions"]["post"]
    assert set(chat["responses"]) >= {"200", "400", "401", "404", "413", "429", "503"}
    assert "422" not in chat["responses"]
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"n", "seed", "stop", "logprobs", "top_logprobs", "stream_options", "tools"} <= set(fields)
    assert {"text/event-stream", "application/json"} == set(chat["responses"]["200"]["content"])


def post(served: Served, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    sent = {"Content-Type": "application/json", **headers}
    return httpx.post(served.url + path, content=body, headers=sent, timeout=30)


def chat(**fields: Any) -> bytes:
    return json.dumps({**CHAT, **fields}).encode()


DEEP = b"[" * 100_000 + b"]" * 100_000
BROKEN = {
    "nothing": b"",
    "half an object": b'{"model": "bare", "messages": [',
    "not utf-8": b'{"model": "\xff\xfe"}',
    "a number": b"7",
    "nothing in it": b"{}",
    "deep nesting": DEEP,
    "deep nesting in a field": b'{"model": "bare", "messages": ' + DEEP + b"}",
    "deep nesting in a neutral field": b'{"model": "bare", "tools": ' + DEEP + b"}",
    "a number of ten thousand digits": b'{"model": "bare", "seed": ' + b"9" * 10_000 + b"}",
    "NaN": chat(temperature=float("nan")),
    "infinity": chat(top_p=float("inf")),
    "a lone surrogate in a message": chat(messages=[{"role": "user", "content": "\ud83d"}]),
    "a lone surrogate in a field's name": chat(**{"\udc00": 1}),
    "a lone surrogate in a stop string": chat(stop=["\ud83d"]),
    "a negative limit": chat(max_tokens=-1),
    "an unknown field": chat(beam_width=4),
    "an unknown field of a message": chat(messages=[{"role": "user", "content": "x", "weight": 2}]),
    "a bias on no token": chat(logit_bias={"x": 1}),
    "a bias on a token below 0": chat(logit_bias={"-1": 1}),
    "a number as text": chat(max_tokens="2"),
    "a bool as a number": chat(n=True),
    "an object as model": chat(model={"a": 1}),
    "a role of nobody": chat(messages=[{"role": "tool", "content": "x"}]),
    "two thousand stop strings": chat(stop=["x"] * 2000),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_body_is_a_400_in_the_envelope(served: Served, name: str) -> None:
    response = post(served, BROKEN[name])
    assert response.status_code == 400, response.text[:300]
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert len(response.content) < 2000


def test_odd_but_whole_text_is_answered(served: Served) -> None:
    for content in (
        "\0",
        "\ud83d\ude42".encode("utf-16", "surrogatepass").decode("utf-16"),
        "\u202e\ufeff",
        "é" * 500,
    ):
        assert post(served, chat(messages=[{"role": "user", "content": content}])).status_code == 200


def test_a_huge_body_is_a_413_whether_it_says_its_size_or_not(served: Served) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(2000):
            yield b"x" * 2**14

    assert post(served, b"x" * (2**22 + 1)).status_code == 413
    try:
        response = httpx.post(f"{served.url}/v1/completions", content=endless(), timeout=30)
        assert response.status_code == 413
    except (httpx.WriteError, httpx.RemoteProtocolError):
        pass  # the server does not read on, and closes the connection


def test_a_body_of_another_type_and_odd_paths_are_refused(served: Served) -> None:
    assert post(served, chat(), **{"Content-Type": "text/plain"}).status_code == 400
    assert post(served, chat(), **{"X-Request-ID": "no spaces"}).status_code == 400
    for path in (
        "/v1/models/%ff",
        "/v1/models/a%00b",
        "/v1/models/" + "x" * 5000,
        "/v1/models/bare%40",
        "/v1/../v1/x",
    ):
        response = httpx.get(served.url + path)
        assert response.status_code == 404, path
        assert response.json()["error"]["message"]
        assert len(response.content) < 6000
