"""The choices of an answer: pieces, stop strings, seeds, and log-probabilities that stay with their text."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.decode.logprobs import TokenLogprob
from serve.choices import Choice, answer, choice_seed
from serve.detokenize import TextStream
from serve.lanes import Progress
from serve.records import Delta
from serve.spelling import Spelling
from tests.serve.test_spelling import BYTE_LEVEL

TOKENS = tuple(BYTE_LEVEL("he said, he would hold")["input_ids"])


def pieces(mail: list[tuple[int, Progress]], num: int, stops: tuple[str, ...] = ()) -> list:
    """What is answered when everything has come already, or nothing waits, at the caller's choice of mail."""

    async def collect() -> list:
        box: asyncio.Queue = asyncio.Queue()
        choices = [Choice(i, TextStream(BYTE_LEVEL.decode, stops), Spelling(BYTE_LEVEL)) for i in range(num)]

        async def slowly() -> None:
            for one in mail:
                box.put_nowait(one)
                await asyncio.sleep(0)
                await asyncio.sleep(0)

        writer = asyncio.create_task(slowly())
        found = [item async for item in answer(box, choices, 3)]
        await writer
        return found

    return asyncio.run(collect())


def steps(tokens: tuple[int, ...], size: int, version: str = "v1") -> list[Progress]:
    """The progress of one request that ends by its length."""
    cuts = [tokens[at : at + size] for at in range(0, len(tokens), size)]
    return [
        Progress(
            version,
            cut,
            finish_reason="length" if at == len(cuts) - 1 else None,
            logprobs=tuple(TokenLogprob(token, -float(token), ((token, -0.5),)) for token in cut),
        )
        for at, cut in enumerate(cuts)
    ]


@given(size=st.integers(1, 5), other=st.integers(1, 5), stop=st.sampled_from([(), ("he w",), ("zz",)]))
def test_streamed_entries_are_those_of_the_text_that_was_given(size, other, stop):
    mail = [(0, one) for one in steps(TOKENS, size)] + [(1, one) for one in steps(TOKENS, other)]
    found = pieces(mail, 2, stop)
    for index in (0, 1):
        own = [piece for piece in found if piece.index == index]
        text = "".join(piece.text for piece in own)
        entries = [entry for piece in own for entry in piece.logprobs]
        assert text == ("he said, " if stop == ("he w",) else "he said, he would hold")
        assert "".join(entry.chosen.text for entry in entries) == text
        assert [entry.offset for entry in entries] == sorted({entry.offset for entry in entries})
        assert [piece.finish_reason for piece in own if piece.finish_reason] == [
            "stop" if stop == ("he w",) else "length"
        ]


@given(size=st.integers(1, 5), stop=st.sampled_from([(), ("he w",)]), end=st.sampled_from([None, 7]))
def test_the_ids_of_all_pieces_are_the_answers_tokens_with_the_one_that_ended_it(size, stop, end):
    progress = steps(TOKENS, size)
    progress[-1] = replace(progress[-1], finish_reason="length" if end is None else "stop", stop_token=end)

    async def collect() -> list:
        box: asyncio.Queue = asyncio.Queue()
        for one in progress:
            box.put_nowait((0, one))
        choice = Choice(0, TextStream(BYTE_LEVEL.decode, stop), None, prompt_ids=(1, 2))
        return [item async for item in answer(box, [choice], 2)]

    found = asyncio.run(collect())
    ids = tuple(token for piece in found for token in piece.token_ids)
    cut = next(n for n in range(len(TOKENS)) if "he w" in BYTE_LEVEL.decode(TOKENS[: n + 1])) + 1
    assert ids == (TOKENS[:cut] if stop else TOKENS + (() if end is None else (end,)))
    assert [piece.prompt_token_ids for piece in found] == [(1, 2), *[None] * (len(found) - 1)]


def test_choices_interleave_and_each_ends_on_its_own():
    short, long = steps(TOKENS[:4], 2), steps(TOKENS, 2)
    mail = [(0, long[0]), (1, short[0]), (0, long[1]), (1, short[1]), *((0, one) for one in long[2:])]
    found = pieces(mail, 2)
    assert [piece.index for piece in found][:4] == [0, 1, 0, 1]
    assert [piece.index for piece in found if piece.finish_reason] == [1, 0]
    assert found[-1].num_new_tokens == len(TOKENS)


def test_an_error_of_one_choice_ends_the_answer():
    (error,) = pieces([(1, Progress("", unhosted="t@v9")), (0, steps(TOKENS, 2)[0])], 2)
    assert (error.status, error.code) == (404, "model_not_found")
    assert "t@v9" in error.message
    *_, last = pieces([(0, steps(TOKENS, 2)[0]), (1, Progress("v1", failed="broken"))], 2)
    assert last.status == 503
    assert not isinstance(last, Delta)


@given(seed=st.integers(-(2**63), 2**63 - 1))
def test_seeds_of_choices_differ_and_the_first_is_the_requests(seed):
    seeds = [choice_seed(seed, index) for index in range(8)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 8
    assert all(-(2**63) <= one < 2**63 for one in seeds)
    assert choice_seed(seed, 1) != choice_seed(seed ^ 1, 1)


@pytest.mark.parametrize("num", [1, 3])
def test_what_came_while_a_piece_was_sent_goes_into_one_piece(num):
    async def collect() -> list:
        box: asyncio.Queue = asyncio.Queue()
        for index in range(num):
            for one in steps(TOKENS, 1):
                box.put_nowait((index, one))
        choices = [Choice(i, TextStream(BYTE_LEVEL.decode), None) for i in range(num)]
        return [item async for item in answer(box, choices, 3)]

    assert [piece.index for piece in asyncio.run(collect())] == list(range(num))
