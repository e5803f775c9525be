"""Text that streams must be the text that the whole answer decodes to, never half a character."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve.detokenize import TextStream


def byte_level() -> Tokenizer:
    """One token a byte, and a few merges that end inside characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ã", "©"), ("ð", "Ł"), ("Ġ", "w")]  # "he", "é", half an emoji, " w"
    vocab = {
        piece: index for index, piece in enumerate([*alphabet, *(left + right for left, right in merges)])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Pieces with a visible space, and bytes of what is not in the vocabulary, as Llama 2 has them."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helowrd"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS = [byte_level(), byte_fallback()]


def pieces_of(stream: TextStream, tokens: list[int], size: int) -> list[str]:
    pieces = [stream.push(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "byte-fallback"])
@given(text=st.text(alphabet="helo wrdé中🙂\n", min_size=1, max_size=30), size=st.integers(1, 5))
def test_pieces_add_up_to_the_decoded_answer_without_half_characters(tokenizer, text, size):
    tokens = tokenizer.encode(text).ids
    pieces = pieces_of(TextStream(tokenizer.decode), tokens, size)
    assert "".join(pieces) == tokenizer.decode(tokens)
    assert not any("\ufffd" in piece for piece in pieces)


@given(
    tokens=st.lists(st.integers(0, 255), max_size=60), sizes=st.tuples(st.integers(1, 7), st.integers(1, 7))
)
def test_bytes_that_are_no_text_give_the_same_answer_for_every_size_of_round(tokens, sizes):
    answers = {"".join(pieces_of(TextStream(TOKENIZERS[0].decode), tokens, size)) for size in sizes}
    assert len(answers) == 1


def test_a_long_run_of_broken_bytes_is_not_held_back_for_ever():
    stream = TextStream(TOKENIZERS[0].decode)
    broken = TOKENIZERS[0].token_to_id("Ł")  # a continuation byte that nothing began
    assert stream.push([broken] * 40)


def test_tokens_without_any_text_cost_no_more_the_more_there_are_and_leave_the_words_around_them():
    """Special ones, of which a request may ask for as many as it likes by a bias: its replica has one event loop."""
    longest = 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return " ".join("word" for token in tokens if token)  # 0 is special

    stream = TextStream(decode)
    text = stream.push([1, 2]) + stream.push([0] * 2000) + stream.push([3]) + stream.finish()
    assert text == "word word word"
    assert (stream.num_tokens, stream.num_given) == (2003, 2003)
    assert longest < 100


@given(
    text=st.text(alphabet="ab c", max_size=40),
    stops=st.lists(st.text(alphabet="ab c", min_size=1, max_size=4), max_size=3),
    size=st.integers(1, 5),
)
def test_an_answer_ends_before_the_first_stop_string_wherever_rounds_cut_it(text, stops, size):
    tokens = TOKENIZERS[0].encode(text).ids
    stream = TextStream(TOKENIZERS[0].decode, stops)
    answer = "".join(pieces_of(stream, tokens, size))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    if not ends:
        assert answer == text
    else:  # the stop string that is complete first ends the answer, at its own beginning
        first_end = min(ends)[0]
        assert answer == text[: min(start for end, start in ends if end == first_end)]
        assert stream.num_tokens <= len(tokens)


def test_text_that_only_looks_like_a_stop_string_is_given_out_once_it_is_not():
    tokens = TOKENIZERS[0].encode("he he wrd").ids
    stream = TextStream(TOKENIZERS[0].decode, ["he wo"])
    assert "".join(pieces_of(stream, tokens, 1)) == "he he wrd"
    assert not stream.stopped


@given(
    text=st.text(alphabet="ab é🙂", max_size=30),
    stops=st.lists(st.text(alphabet="ab é", min_size=1, max_size=3), max_size=2),
    size=st.integers(1, 5),
)
def test_tokens_are_told_with_the_piece_that_has_their_text_and_never_those_of_a_stop_string(
    text, stops, size
):
    tokens = TOKENIZERS[0].encode(text).ids
    stream, given = TextStream(TOKENIZERS[0].decode, stops), ""
    for at in range(0, len(tokens), size):
        given += stream.push(tokens[at : at + size])
        told = TOKENIZERS[0].decode(tokens[: stream.num_given]).rstrip("\ufffd")
        assert told.startswith(given)
        assert stream.num_given == 0 or stream.offsets[stream.num_given - 1] < len(given)
    given += stream.finish()
    if not stream.stopped:
        assert stream.num_given == len(tokens)
    assert [offset for offset in stream.offsets if offset < len(given)] == stream.offsets[: stream.num_given]
