"""A request means what OpenAI says it means, or it is refused by the name of the field."""

import pytest
from pydantic import ValidationError

from serve.errors import mistake_in_body
from serve.records import named
from serve.schemas import ChatRequest, TextRequest

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def refusal(fields):
    with pytest.raises(ValidationError) as caught:
        ChatRequest.model_validate({**HELLO, **fields})
    return mistake_in_body(caught.value.errors())


@pytest.mark.parametrize(
    "field",
    [
        {"best_of": 2},
        {"tools": [{"type": "function"}]},
        {"suffix": "!"},
        {"beams": 3},
        {"tool_choice": "auto"},
    ],
)
def test_a_field_that_would_change_the_answer_is_refused_by_name(field):
    error = refusal(field)
    assert (error.status, error.param, error.code) == (400, next(iter(field)), "unsupported_parameter")


@pytest.mark.parametrize(
    "field",
    [
        {"n": 1},
        {"presence_penalty": 0.0},
        {"logprobs": False},
        {"tools": None},
        {"response_format": {"type": "text"}},
        {"function_call": "none"},
    ],
)
def test_a_value_that_asks_for_nothing_is_accepted(field):
    assert ChatRequest.model_validate({**HELLO, **field}) == ChatRequest.model_validate(HELLO)


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"max_tokens": 0},
        {"stop": ""},
        {"stop": list("abcde")},
        {"seed": 2**63},
        {"max_drafted": -1},
        {"n": 0},
        {"repetition_penalty": 1e-300},
        {"n": 9},
        {"top_logprobs": 21, "logprobs": True},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"max_tokens": 1.5},
        {"logit_bias": {"+4": 1}},
        {"logit_bias": {"-1": 1}},
        {"stream": "yes"},
        {"logit_bias": {"4": float("nan")}},
        {"user": "\ud800"},
    ],
)
def test_a_value_out_of_range_names_its_field(field):
    assert (refusal(field).param or "").startswith(next(iter(field)))


def test_defaults_are_those_of_openai():
    request = ChatRequest.model_validate(HELLO)
    assert (request.temperature, request.top_p, request.seed, request.max_new_tokens) == (
        1.0,
        1.0,
        None,
        None,
    )
    assert TextRequest(model="m", prompt="x").max_new_tokens == 16


def test_a_temperature_that_would_overflow_logits_is_greedy():
    for tiny, taken in ((1e-300, 0.0), (1e-8, 0.0), (0.001, 0.001), (0, 0.0)):
        assert ChatRequest.model_validate({**HELLO, "temperature": tiny}).temperature == taken


def test_a_prompt_in_a_list_of_one_is_that_prompt():
    """LangChain's and other clients' only form."""
    for prompt, taken in ((["hello"], "hello"), ([[5, 6.0]], (5, 6)), ([5, 6], (5, 6)), ("hello", "hello")):
        assert TextRequest.model_validate({"model": "m", "prompt": prompt}).prompt == taken
    for prompt in (["a", "b"], [[5], [6]], [["a"]], [[]], [""], []):
        with pytest.raises(ValidationError) as caught:
            TextRequest.model_validate({"model": "m", "prompt": prompt})
        assert (mistake_in_body(caught.value.errors()).param or "").startswith("prompt")
    with pytest.raises(ValidationError, match="has 2 prompts; send one a request"):
        TextRequest.model_validate({"model": "m", "prompt": ["a", "b"]})


def test_a_number_without_a_fraction_is_an_integer():
    assert ChatRequest.model_validate({**HELLO, "max_tokens": 2.0}).max_new_tokens == 2


def test_the_newer_name_of_the_token_limit_wins():
    both = ChatRequest.model_validate({**HELLO, "max_tokens": 5, "max_completion_tokens": 7})
    assert (both.max_new_tokens, both.limit_field) == (7, "max_completion_tokens")
    assert ChatRequest.model_validate({**HELLO, "max_tokens": 5}).limit_field == "max_tokens"


def test_text_parts_are_joined_and_other_parts_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "developer", "content": parts}]}
    )
    assert request.messages[0].as_template_sees_it() == {"role": "system", "content": "ab"}
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    assert refusal({"messages": image}).param == "messages.0.content"


def test_an_answer_of_ours_can_be_sent_back_as_the_client_library_dumps_it():
    said = {"role": "assistant", "content": "hi", "refusal": None, "audio": None, "tool_calls": None}
    request = ChatRequest.model_validate({"model": "m", "messages": [*HELLO["messages"], said]})
    assert request.messages[1].content == "hi"


def test_an_answer_of_another_server_can_be_sent_back_unless_it_called_a_tool():
    """OpenAI's has empty annotations, vLLM's an empty list of calls."""
    said = {"role": "assistant", "content": "hi", "annotations": [], "tool_calls": []}
    request = ChatRequest.model_validate({"model": "m", "messages": [*HELLO["messages"], said]})
    assert request.messages[1].as_template_sees_it() == {"role": "assistant", "content": "hi"}
    error = refusal({"messages": [{**said, "tool_calls": [{"id": "1"}]}]})
    assert (error.param, error.code) == ("messages.0.tool_calls", "unsupported_parameter")


def test_log_probabilities_are_asked_for_as_each_endpoint_does():
    def num_logprobs(**fields):
        return ChatRequest.model_validate({**HELLO, **fields}).num_logprobs

    assert num_logprobs() is None
    assert num_logprobs(logprobs=False) is None
    assert num_logprobs(logprobs=True) == 0
    assert num_logprobs(logprobs=True, top_logprobs=20) == 20
    assert refusal({"top_logprobs": 3}).message == "body: top_logprobs needs logprobs: true"
    assert TextRequest(model="m", prompt="x").num_logprobs is None
    assert TextRequest(model="m", prompt="x", logprobs=0).num_logprobs == 0
    for wrong in (6, -1, True):
        with pytest.raises(ValidationError, match="logprobs"):
            TextRequest(model="m", prompt="x", logprobs=wrong)


def test_a_version_is_pinned_behind_an_at_sign():
    assert named("legal") == ("legal", None)
    assert named("legal@v3") == ("legal", "v3")
    assert named("legal@") == ("legal", "")  # no version has an empty name: it is refused, not ignored


def test_openapi_says_that_null_is_absent_and_which_values_ask_for_nothing():
    schema = ChatRequest.model_json_schema()
    assert {"type": "null"} in schema["properties"]["temperature"]["anyOf"]
    assert schema["properties"]["tools"]["enum"] == [[], None]
    assert {"minimum": 1, "maximum": 8}.items() <= schema["properties"]["n"]["anyOf"][0].items()
    assert [one["type"] for one in schema["properties"]["stop"]["anyOf"][0]["anyOf"]] == ["string", "array"]
    assert schema["required"] == ["model", "messages"]
    assert schema["additionalProperties"] is False
