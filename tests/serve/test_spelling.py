"""A token in a list of log-probabilities is written so that the answer can be put together from its bytes."""

from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from serve.spelling import Spelling, raw_bytes
from tests.serve.test_detokenize import TOKENIZERS

BYTE_LEVEL, BYTE_FALLBACK = (PreTrainedTokenizerFast(tokenizer_object=tokenizer) for tokenizer in TOKENIZERS)


@given(text=st.text(alphabet="helo wrdé中🙂\n", min_size=1, max_size=20))
def test_the_bytes_of_an_answers_tokens_are_the_answer(text):
    spell = Spelling(BYTE_LEVEL)
    tokens = BYTE_LEVEL(text)["input_ids"]
    assert b"".join(bytes(spell(token)[1] or ()) for token in tokens) == text.encode()


def test_a_word_keeps_its_space_and_a_byte_of_a_character_its_value():
    spell = Spelling(BYTE_FALLBACK)
    (space,) = BYTE_FALLBACK.convert_tokens_to_ids(["\u2581"])
    (byte,) = BYTE_FALLBACK.convert_tokens_to_ids(["<0xE4>"])
    assert spell(space) == (" ", (32,))
    assert spell(byte) == ("\ufffd", (0xE4,))


def test_a_piece_of_no_known_way_of_writing_has_no_bytes():
    assert raw_bytes("中") is None
    assert raw_bytes(None) is None
    assert raw_bytes("<0xG1>") == tuple(b"<0xG1>")  # no byte of a fallback: text of printable characters
