"""What a client is told names its field, and is text of a bounded length whatever was sent."""

import pytest
from pydantic import ValidationError

from serve.errors import ErrorBody, mistake_in_bias, mistake_in_body
from serve.schemas import TextRequest


def refusal(**fields) -> ErrorBody:
    with pytest.raises(ValidationError) as caught:
        TextRequest.model_validate({"model": "m", "prompt": "x", **fields})
    return mistake_in_body(caught.value.errors())


def test_a_bias_on_a_token_the_target_lacks_is_told_with_its_field():
    """The vocabulary is the target's, so this is known only where the target is."""
    assert mistake_in_bias([(0, 1.0), (319, -100.0)], 320) is None
    for token in (-1, 320):
        error = mistake_in_bias([(5, 1.0), (token, 1.0)], 320)
        assert error is not None
        assert (error.status, error.param) == (400, "logit_bias")
        assert f"logit_bias: {token} is no token id" in error.message


def test_an_error_is_text_of_bounded_length_whatever_the_client_wrote():
    error = refusal(**{"\ud800" + "x" * 10**6: 1})
    assert error.status == 400
    assert len(error.message.encode()) < 300


def test_a_field_of_two_forms_is_named_as_the_client_writes_it():
    assert refusal(prompt={"a": 1}).param == "prompt"
    assert (refusal(prompt=["a", 1]).param or "").startswith("prompt")
