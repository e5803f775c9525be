"""The served family as clients see it: the real Serve application, the real `openai` client, loopback."""

import asyncio
import json
import time

import httpx
import openai
import pytest

from farm.bench.serve import Endpoint, Load, bench_url, with_engine
from farm.config import Manifest, UserError
from farm.data.chat import encode_chat
from farm.decode.engine import Engine, Request, Route
from farm.decode.sampling import SamplingParams
from farm.evaluate.counters import read_counters
from farm.sections import TargetSpec
from farm.target.load import load_target
from serve.listing import FRESH_S
from tests.serve.family import publish, tiny_expert
from tests.serve.served import HELLO, HOSTED, MAX_LENGTH, hosted, wait_until

pytestmark = pytest.mark.ray


def test_the_list_of_models_names_each_target_with_what_drafts_for_it(served):
    versions = {model.id: model.version for model in served.client.models.list()}
    assert versions == {"adapted": "v1", "bare": "base", "misfit": "plain", "moving": "base"}
    assert served.client.models.retrieve("bare").id == "bare"
    assert httpx.get(f"{served.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/readyz").json() == {"status": "ready", "targets": 4}


@pytest.mark.parametrize("target", ["adapted", "bare", "misfit"])
def test_a_greedy_chat_is_what_the_target_decodes_without_any_draft(served, target):
    loaded = load_target(TargetSpec(name=target, model=str(served.root / target), prompts=""))
    ids = tuple(encode_chat(loaded.tokenizer, HELLO, loaded.chat_template))
    engine = Engine([Route(loaded.forward, loaded.stop_ids)], num_slots=1, max_length=MAX_LENGTH, k=0)
    (expected,) = engine.run([Request("direct", ids, SamplingParams(max_new_tokens=24))])
    answer = served.greedy(target)
    assert answer.choices[0].message.content == loaded.tokenizer.decode(
        expected.tokens, skip_special_tokens=True
    )
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(expected.tokens) - (expected.finish_reason == "stop")


def test_targets_answer_for_themselves(served):
    answers = {served.greedy(target).choices[0].message.content for target in HOSTED}
    assert len(answers) == len(HOSTED)


def test_streamed_pieces_add_up_to_the_whole_answer(served):
    whole = served.greedy("adapted")
    chunks = list(served.greedy("adapted", stream=True))
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    )
    assert len(chunks) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint} == {"adapted@v1"}
    assert all(chunk.usage is None for chunk in chunks)


def test_a_client_may_have_its_request_decoded_plainly(served):
    drafted = served.greedy("adapted")
    (before,) = hosted("adapted")
    plain = served.greedy("adapted", extra_body={"max_drafted": 0})
    (after,) = hosted("adapted")
    assert plain.choices[0].message.content == drafted.choices[0].message.content
    assert after.rounds - before.rounds == after.emitted - before.emitted > 0
    with pytest.raises(openai.BadRequestError, match="max_drafted"):
        served.greedy("adapted", extra_body={"max_drafted": -1})


def test_usage_comes_last_in_a_stream_that_asked_for_it(served):
    *chunks, last = served.greedy("bare", stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == served.greedy("bare").usage
    assert all(chunk.usage is None for chunk in chunks)


def test_async_clients_of_all_targets_at_once_get_their_own_answers(served):
    async def stream(client: openai.AsyncOpenAI, target: str) -> str:
        chunks = await client.chat.completions.create(
            model=target, messages=HELLO, temperature=0, max_tokens=24, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def all_streams() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, target) for target in HOSTED))

    assert asyncio.run(all_streams()) == [served.greedy(name).choices[0].message.content for name in HOSTED]


def test_a_seed_repeats_a_sampled_answer_and_no_seed_does_not(served):
    def sampled(seed: int | None) -> str:
        answer = served.client.chat.completions.create(
            model="adapted", messages=HELLO, seed=seed, max_tokens=24, top_p=0.95
        )
        return answer.choices[0].message.content

    assert sampled(5) == sampled(5)
    assert len({sampled(None) for _ in range(3)}) > 1


def test_an_answer_is_cut_before_a_stop_string(served):
    whole = served.greedy("bare").choices[0].message.content
    stop = whole[7:10]
    cut = served.greedy("bare", stop=[stop])
    streamed = served.greedy("bare", stop=[stop], stream=True)
    expected = whole[: whole.index(stop)]
    assert cut.choices[0].message.content == expected
    assert cut.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == expected
    assert cut.usage.completion_tokens < 24


def test_text_completions_take_text_or_token_ids(served):
    def complete(prompt: str | list[str] | list[int], **fields):
        return served.client.completions.create(
            model="adapted", prompt=prompt, temperature=0, max_tokens=12, **fields
        )

    loaded = load_target(TargetSpec(name="adapted", model=str(served.root / "adapted"), prompts=""))
    text = complete("un été").choices[0].text
    assert complete(loaded.tokenizer("un été")["input_ids"]).choices[0].text == text
    assert complete(["un été"]).choices[0].text == text
    assert "".join(chunk.choices[0].text for chunk in complete("un été", stream=True)) == text
    with pytest.raises(openai.BadRequestError, match="token ids must be"):
        complete([10**6])


def test_bias_and_penalties_reach_the_sampler(served):
    biased = served.greedy("adapted", max_tokens=6, logit_bias={"40": 100})
    plain = served.greedy("adapted", max_tokens=60)
    pushed = served.greedy(
        "adapted", max_tokens=60, presence_penalty=2.0, extra_body={"repetition_penalty": 5.0}
    )
    assert len(set(biased.choices[0].message.content)) <= 2
    # A greedy answer of a random model repeats itself, which is what penalties are against.
    assert plain.choices[0].message.content != pushed.choices[0].message.content


def test_a_bias_on_a_token_that_does_not_exist_is_a_400(served):
    with pytest.raises(openai.BadRequestError, match="logit_bias") as caught:
        served.greedy("adapted", max_tokens=2, logit_bias={"999999": 1})
    assert caught.value.body["param"] == "logit_bias"


def test_an_unknown_model_is_a_404_with_openais_envelope(served):
    for name in ("nobody", "broken"):
        with pytest.raises(openai.NotFoundError) as caught:
            served.greedy(name)
        assert caught.value.body["code"] == "model_not_found"
        assert name in caught.value.body["message"]


def test_an_unsupported_field_is_a_400_that_names_it(served):
    with pytest.raises(openai.BadRequestError) as caught:
        served.greedy("bare", extra_body={"tools": [{"type": "function"}]})
    assert (caught.value.body["param"], caught.value.body["code"]) == ("tools", "unsupported_parameter")


def test_a_prompt_without_room_for_an_answer_is_a_400_also_for_a_stream(served):
    long = [{"role": "user", "content": "fox " * MAX_LENGTH}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            served.client.chat.completions.create(model="bare", messages=long, stream=stream)
        assert caught.value.body["code"] == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as caught:
        served.client.completions.create(model="bare", prompt="x" * (2**20 + 1))
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b"{broken", 400),
        ("POST", "/v1/chat/completions", b'"text"', 400),
        ("POST", "/v1/chat/completions", b'{"model": "bare", "messages": []}', 400),
        ("POST", "/v1/completions", b'{"model": "bare", "prompt": ""}', 400),
        ("GET", "/v1/models/nobody", b"", 404),
        ("GET", "/v1/nothing", b"", 404),
        ("GET", "/v1/chat/completions", b"", 405),
    ],
)
def test_every_mistake_has_the_envelope(served, method, path, body, status):
    response = httpx.request(
        method, served.url + path, content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_leaves_frees_its_slot(served):
    stream = served.greedy("bare", max_tokens=MAX_LENGTH, stream=True)
    next(iter(stream))
    assert hosted("bare")[0].num_live == 1
    stream.close()
    wait_until(lambda: hosted("bare")[0].num_open == hosted("bare")[0].num_live == 0, seconds=5)
    fields = {"model": "bare", "messages": HELLO, "temperature": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json=fields, timeout=0.5)
    wait_until(lambda: hosted("bare")[0].num_open == hosted("bare")[0].num_live == 0, seconds=5)


def test_a_moved_live_pointer_is_followed_without_a_restart_and_a_bad_one_is_not(served):
    before = hosted("moving")[0].pid
    answer = served.greedy("moving")
    assert answer.system_fingerprint == "moving@base"
    assert publish(served.store, "moving", tiny_expert(2)) == "v1"
    wait_until(lambda: served.greedy("moving", 1).system_fingerprint == "moving@v1", seconds=10)
    assert served.greedy("moving").choices[0].message.content == answer.choices[0].message.content
    wait_until(lambda: [engine.version for engine in hosted("moving")] == ["v1"], seconds=5)
    assert hosted("moving")[0].pid == before
    publish(served.store, "moving", b"no safetensors")
    publish(served.store, "bare", tiny_expert(3))
    wait_until(lambda: served.greedy("bare", 1).system_fingerprint == "bare@v1", seconds=10)
    assert served.greedy("moving", 1).system_fingerprint == "moving@v1"


def test_more_requests_than_the_queue_takes_are_told_when_to_come_back(served):
    async def burst() -> list[httpx.Response]:
        # Long enough for all to have come before the first has ended, on a machine that does other things too.
        fields = {"model": "adapted", "messages": HELLO, "temperature": 0, "max_tokens": 600}
        async with httpx.AsyncClient(timeout=60) as client:
            asked = (client.post(f"{served.url}/v1/chat/completions", json=fields) for _ in range(16))
            return await asyncio.gather(*asked)

    responses = asyncio.run(burst())
    turned_away = [response for response in responses if response.status_code == 429]
    assert turned_away, [(response.status_code, response.text[:200]) for response in responses]
    assert all(int(response.headers["Retry-After"]) >= 1 for response in turned_away)
    assert {response.json()["error"]["type"] for response in turned_away} == {"rate_limit_error"}
    answers = {
        response.json()["choices"][0]["message"]["content"] for response in responses if response.is_success
    }
    assert len(answers) == 1


def test_a_replica_that_is_full_of_answers_keeps_no_probe_waiting(served):
    async def probed() -> tuple[httpx.Response, float, int]:
        fields = {"model": "bare", "messages": HELLO, "temperature": 0, "max_tokens": MAX_LENGTH}
        async with httpx.AsyncClient(timeout=60) as client:
            asked = (client.post(f"{served.url}/v1/chat/completions", json=fields) for _ in range(4))
            answers = [asyncio.create_task(one) for one in asked]
            await asyncio.sleep(FRESH_S + 0.1)
            started_s = time.perf_counter()
            response = await client.get(f"{served.url}/readyz")
            took_s, num_open = time.perf_counter() - started_s, sum(not one.done() for one in answers)
            for one in answers:
                one.cancel()
            await asyncio.gather(*answers, return_exceptions=True)
            return response, took_s, num_open

    served.client.models.list()
    response, took_s, num_open = asyncio.run(probed())
    assert num_open == 4, "an answer ended before the probe: ask for longer ones"
    assert response.json() == {"status": "ready", "targets": 4}
    assert took_s < 1.0
    wait_until(lambda: hosted("bare")[0].num_open == 0, seconds=5)


def test_chunks_say_what_was_drafted_when_asked(served):
    options = {"include_usage": True, "include_rounds": True}
    fields = {"model": "adapted", "messages": HELLO, "temperature": 0, "max_tokens": 24, "stream": True}
    lines = httpx.post(
        f"{served.url}/v1/chat/completions", json={**fields, "stream_options": options}, timeout=30
    )
    chunks = [json.loads(line[6:]) for line in lines.text.split("\n\n") if line.startswith("data: {")]
    told = [chunk for chunk in chunks if "farm" in chunk]
    assert all(
        "".join(text for text, _ in c["farm"]["spans"]) == c["choices"][0]["delta"]["content"] for c in told
    )
    assert told[-1]["farm"]["tokens"] == chunks[-1]["usage"]["completion_tokens"] == 24
    assert told[-1]["farm"]["emitted"] == 23  # the first token is the prompt's
    assert 23 / 4 <= told[-1]["farm"]["rounds"] <= 23
    assert all("farm" not in chunk.model_extra for chunk in served.greedy("adapted", stream=True))


def test_metrics_of_the_endpoint_are_what_probe_reads(served):
    served.greedy("adapted", max_tokens=24)
    with pytest.raises(openai.NotFoundError):
        served.greedy("nobody-knows-me")
    text = httpx.get(f"{served.url}/metrics").text
    (counters,) = (one for one in read_counters(served.url) if one.model == "adapted")
    assert (counters.engine, counters.by_position, counters.k) == ("farm", True, 3)
    assert 1 <= counters.tau <= 4
    assert counters.token_s > 0
    for name in ("farm_requests_total", "farm_time_to_first_token_seconds_count", "farm_slots"):
        assert f"\n{name}{{" in text
    assert 'farm_plain_fallbacks_total{reason="adapter"' in text
    assert 'target="misfit"' in text
    assert "nobody-knows-me" not in text


def test_a_benchmark_of_this_endpoint_finds_every_answer_its_own_targets(served, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = ["the quick brown fox", "un été à la plage", "one two three"]
    prompts.write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines * 4))
    targets = [
        {"name": name, "model": str(served.root / name), "prompts": str(prompts)}
        for name in ("adapted", "bare")
    ]
    manifest = Manifest.model_validate(
        {"base": str(served.root / "adapted"), "store": served.store, "targets": targets}
        | {"evaluate": {"prompts": 3}, "serve": {"num_slots": 2, "k": 3, "control": "fixed-3"}}
    )
    load = Load(clients=4, duration_s=3.0, warm_up_s=0.5, open_s=1.0, open_factor=3.0, engine_s=0.6)
    found = bench_url(manifest, Endpoint(served.url), load, say=lambda _: None)
    assert found["completed"] == found["requests"] > 4
    assert (found["adapters"], found["errors"], found["wrong_model"], found["differing"]) == (2, 0, 0, 0)
    assert found["open_loop"]["rejected_without_retry_after"] == 0
    beside = with_engine(manifest, load, found, say=lambda _: None)
    assert beside["engine_tokens_per_s"] > 0
    assert beside["over_engine"] == pytest.approx(
        found["tokens_per_s"] / beside["engine_tokens_per_s"], abs=1e-3
    )


def test_a_store_without_a_family_is_refused_before_anything_starts(tmp_path):
    from serve.app import BuildArgs, build

    with pytest.raises(UserError, match="farm onboard"):
        build(BuildArgs(store=str(tmp_path)))
