"""A card is read whoever wrote it, and an adapter is refused where it does not belong."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.card import (
    FULL_VOCABULARY,
    Card,
    Fit,
    check_fit,
    config_digest,
    mismatch,
    parse_card,
    tokenizer_digest,
    vocabulary_digest,
)
from farm.config import UserError

HERE = Fit(
    trunk_key="t1",
    trunk_digest="a" * 64,
    hidden_size=64,
    vocab_size=320,
    vocabulary_digest="b" * 64,
    tokenizer_digest="c" * 64,
)
# Before cards named digests: what the farm of that time wrote, cut short.
OLD = {"trunk_key": "t1", "adapt_key": "x", "evaluation": {"tau_adapted": 4.0, "name": "math"}, "other": [1]}


@pytest.mark.parametrize("field", Fit.model_fields)
def test_each_difference_is_refused_with_both_values(field):
    theirs = HERE.model_copy(update={field: "d" * 64 if isinstance(getattr(HERE, field), str) else 7})
    with pytest.raises(UserError) as caught:
        check_fit("math@v3", theirs, HERE)
    for part in ("math@v3", getattr(theirs, field), getattr(HERE, field)):
        assert str(part) in str(caught.value)
    check_fit("math@v3", HERE, HERE)


@given(st.sets(st.sampled_from(sorted(Fit.model_fields))))
def test_what_either_side_does_not_say_is_no_difference(silent):
    assert mismatch(HERE.model_copy(update=dict.fromkeys(silent)), HERE) is None
    assert mismatch(HERE, HERE.model_copy(update=dict.fromkeys(silent))) is None


def test_an_old_card_is_read_and_fits_by_what_it_says():
    card = parse_card("math@v1", OLD)
    assert (card.trunk_digest, card.library_versions, card.files) == (None, {}, {})
    assert card.tau_table == [("adapted", "0", 4.0)]
    check_fit("math@v1", card, HERE)
    with pytest.raises(UserError, match="trunk t1, here is t2"):
        check_fit("math@v1", card, HERE.model_copy(update={"trunk_key": "t2"}))


def test_a_damaged_card_names_version_and_field():
    with pytest.raises(UserError, match=r"math@v1: its card is damaged: hidden_size"):
        parse_card("math@v1", OLD | {"hidden_size": "wide"})


def test_a_card_survives_its_json():
    card = Card(**HERE.model_dump(), target="math", config={"adapt": {"lr": 0.1}}, files={"e": "f"})
    assert Card.model_validate_json(card.model_dump_json()) == card


def test_tau_is_listed_by_draft_and_temperature():
    evaluation = {"tau_base_draft": 1.5, "tau_adapted": 3.0, "temperature_1": {"tau_adapted": 2.0}}
    card = Card(evaluation=evaluation, config={"evaluate": {"temperatures": [0.5, 1.0]}})
    assert card.tau_table == [("base draft", "0.5", 1.5), ("adapted", "0.5", 3.0), ("adapted", "1", 2.0)]


def test_digests_ignore_the_order_of_fields_and_see_every_value():
    assert config_digest({"a": 1, "b": {"c": 2, "d": 3}}) == config_digest({"b": {"d": 3, "c": 2}, "a": 1})
    assert config_digest({"a": 1}) != config_digest({"a": 2})
    assert tokenizer_digest({"x": 0, "y": 1}) == tokenizer_digest({"y": 1, "x": 0})
    assert tokenizer_digest({"x": 0, "y": 1}) != tokenizer_digest({"x": 1, "y": 0})
    assert vocabulary_digest([1, 2]) != vocabulary_digest([2, 1])  # the map is the order
    assert vocabulary_digest(None) == FULL_VOCABULARY
