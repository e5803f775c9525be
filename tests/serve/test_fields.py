"""Fields of a request at the real endpoint: choices, log-probabilities, pinned versions."""

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.serve.served import HELLO, MAX_LENGTH, hosted, wait_until

pytestmark = pytest.mark.ray


def sampled(served, n: int, seed: int, **fields):
    return served.client.chat.completions.create(
        model="adapted", messages=HELLO, n=n, seed=seed, max_tokens=12, **fields
    )


def test_choices_of_a_seed_repeat_differ_and_begin_with_the_single_answer(served):
    first, again = sampled(served, 3, 5), sampled(served, 3, 5)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    alone = sampled(served, 1, 5)
    assert alone.choices[0].message.content == texts[0]
    assert first.usage.prompt_tokens == alone.usage.prompt_tokens
    assert first.usage.completion_tokens == 3 * alone.usage.completion_tokens


def test_streamed_choices_interleave_and_add_up_to_the_whole_ones(served):
    """More choices than slots: the third waits for one of the others."""
    whole = sampled(served, 3, 7)
    chunks = list(sampled(served, 3, 7, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    texts = ["", "", ""]
    for chunk in pieces:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert {chunk.choices[0].index for chunk in pieces if chunk.choices[0].delta.role} == {0, 1, 2}
    ends = [chunk.choices[0].index for chunk in pieces if chunk.choices[0].finish_reason]
    assert sorted(ends) == [0, 1, 2]
    assert last.usage == whole.usage
    order = [chunk.choices[0].index for chunk in pieces]
    assert order.index(1) < len(order) - 1 - order[::-1].index(0), (
        "the second waited for the end of the first"
    )


def test_greedy_choices_are_all_the_greedy_answer(served):
    alone = served.greedy("bare").choices[0].message.content
    assert [choice.message.content for choice in served.greedy("bare", n=2).choices] == [alone, alone]


def test_a_client_that_leaves_frees_the_slots_of_all_its_choices_waiting_ones_too(served):
    stream = served.greedy("bare", max_tokens=MAX_LENGTH, stream=True, n=4)
    next(iter(stream))
    assert hosted("bare")[0].num_live == 2
    assert hosted("bare")[0].num_open == 4
    stream.close()
    wait_until(lambda: hosted("bare")[0].num_open == hosted("bare")[0].num_live == 0, seconds=5)


def test_a_client_that_leaves_while_its_request_is_queued_leaves_nothing_behind(served):
    import httpx

    holder = served.greedy("bare", max_tokens=MAX_LENGTH, stream=True, n=2)
    next(iter(holder))
    body = {"model": "bare", "messages": HELLO, "max_tokens": MAX_LENGTH}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/chat/completions", json=body, timeout=0.7)
    wait_until(lambda: hosted("bare")[0].num_open == 2, seconds=5)
    holder.close()
    wait_until(lambda: hosted("bare")[0].num_open == 0, seconds=5)


def test_log_probabilities_of_a_chat_are_those_of_the_targets_plain_forward(served):
    answer = served.greedy("adapted", 10, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    said = b"".join(bytes(entry.bytes) for entry in content)  # a random model's tokens: not always characters
    assert said.decode(errors="replace") == answer.choices[0].message.content
    tokenizer, logp_NV = plain(served, "adapted", answer.usage.completion_tokens)
    best = logp_NV.topk(3, dim=-1)
    for n, entry in enumerate(content):
        assert entry.logprob == pytest.approx(float(best.values[n, 0]), abs=1e-4)
        assert [top.token for top in entry.top_logprobs] == [
            tokenizer.decode([token]) for token in best.indices[n].tolist()
        ]


def plain(served, target: str, num: int):
    """The tokenizer, and log_softmax [num, V] at each greedy token of `transformers`' own loop."""
    from farm.data.chat import encode_chat
    from farm.sections import TargetSpec
    from farm.target.load import load_target

    loaded = load_target(TargetSpec(name=target, model=str(served.root / target), prompts=""))
    model = AutoModelForCausalLM.from_pretrained(served.root / target)
    ids = encode_chat(loaded.tokenizer, HELLO, loaded.chat_template)
    rows = []
    with torch.no_grad():
        for _ in range(num):
            rows.append(model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1))
            ids = [*ids, int(rows[-1].argmax())]
    return loaded.tokenizer, torch.stack(rows)


def test_streamed_log_probabilities_concatenate_to_the_whole_ones_also_before_a_stop_string(served):
    text = served.greedy("bare").choices[0].message.content
    fields = {"logprobs": True, "top_logprobs": 1, "stop": [text[7:10]]}
    whole = served.greedy("bare", **fields).choices[0]
    streamed = [
        entry
        for chunk in served.greedy("bare", stream=True, **fields)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == whole.logprobs.content
    said = b"".join(bytes(entry.bytes) for entry in streamed)
    assert said.decode(errors="replace").startswith(whole.message.content)


def test_text_completions_have_openais_older_form(served):
    def complete(**fields):
        return served.client.completions.create(
            model="adapted", prompt="un été", temperature=0, max_tokens=6, **fields
        )

    choice = complete(logprobs=2).choices[0]
    lists = choice.logprobs
    assert len(lists.tokens) == len(lists.text_offset) == 6
    for token, at in zip(lists.tokens, lists.text_offset, strict=True):
        special = token.startswith("<|") or "\ufffd" in token  # no text of its own
        assert special or token in choice.text[at : at + len(token) + 4], (token, at, choice.text)
    for token, value, top in zip(lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True):
        assert top[token] == value == max(top.values())
    assert complete().choices[0].logprobs is None
    assert [len(top) for top in complete(logprobs=0).choices[0].logprobs.top_logprobs] == [1] * 6
    with pytest.raises(openai.BadRequestError, match="logprobs"):
        complete(logprobs=6)


@pytest.mark.parametrize("bias", [{}, {"1": 100}])  # of <|end|>
def test_token_ids_come_with_the_stop_token_whole_and_in_pieces_when_asked_for(served, bias):
    prompt = served.client.completions
    asked = {
        "model": "adapted", "prompt": [20, 21, 22], "max_tokens": 9, "temperature": 0, "logit_bias": bias,
    }  # fmt: skip
    choice = prompt.create(**asked, extra_body={"return_token_ids": True}).choices[0]
    assert choice.prompt_token_ids == [20, 21, 22]
    assert choice.finish_reason == ("stop" if bias else "length")
    assert choice.token_ids[-1:] == [1] if bias else len(choice.token_ids) == 9
    stream = prompt.create(**asked, stream=True, extra_body={"return_token_ids": True})
    pieces = [piece.choices[0] for piece in stream]
    assert [token for piece in pieces for token in piece.token_ids] == choice.token_ids
    assert pieces[0].prompt_token_ids == [20, 21, 22]
    assert not hasattr(prompt.create(**asked).choices[0], "token_ids")


def test_a_pinned_version_is_served_or_refused_by_its_name(served):
    pinned = served.greedy("adapted@v1")
    assert pinned.choices == served.greedy("adapted").choices
    assert (pinned.model, pinned.system_fingerprint) == ("adapted@v1", "adapted@v1")
    for name in ("adapted@v2", "adapted@", "adapted@base", "nobody@v1"):
        with pytest.raises(openai.NotFoundError) as caught:
            served.greedy(name)
        assert repr(name) in caught.value.body["message"]
    assert served.client.models.retrieve("adapted@v1").id == "adapted"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("adapted@v2")
