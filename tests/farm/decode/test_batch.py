"""What rows may draft, by what they have room for, what they asked for and whether their target has a draft."""

import pytest

from farm.decode.batch import Batch
from farm.decode.routes import Route, Routes
from farm.decode.sampling import SamplingParams
from farm.decode.scheduler import LiveRequest, Request
from tests.farm.models import tiny_pair

PROMPT = (1, 2, 3)


def batch_of(*rows: tuple[str, SamplingParams], in_trees: bool = False) -> Batch:
    """Rows of targets "drafted" and "plain", where a round drafts at most 4 tokens."""
    target, draft = tiny_pair(seed=1)
    routes = Routes()
    routes.host(Route(target, frozenset(), draft, target="drafted"))
    routes.host(Route(target, frozenset(), target="plain"))
    live = [
        LiveRequest(Request(str(row), PROMPT, params, name), [*PROMPT], len(PROMPT) + params.max_new_tokens)
        for row, (name, params) in enumerate(rows)
    ]
    return Batch.of(live, routes, 4, in_trees)


@pytest.mark.parametrize(
    ("new", "limits"), [(0, (4, 2, 0)), (15, (4, 2, 0)), (16, (3, 2, 0)), (18, (1, 1, 0)), (19, (0, 0, 0))]
)
def test_a_row_drafts_no_more_than_it_has_room_for_beside_the_token_that_follows(
    new: int, limits: tuple[int, ...]
) -> None:
    every = SamplingParams(max_new_tokens=20)
    batch = batch_of(
        ("drafted", every), ("drafted", SamplingParams(max_new_tokens=20, max_drafted=2)), ("plain", every)
    )
    assert batch.load_at([len(PROMPT) + new] * 3).limits == limits


@pytest.mark.parametrize(("new", "limits"), [(10, (4,)), (18, (4,)), (19, (0,))])
def test_a_tree_is_drafted_whole_or_not_at_all(new: int, limits: tuple[int, ...]) -> None:
    batch = batch_of(("drafted", SamplingParams(max_new_tokens=20)), in_trees=True)
    assert batch.load_at([len(PROMPT) + new]).limits == limits


def test_one_rows_end_shortens_only_its_own_drafts() -> None:
    batch = batch_of(
        ("drafted", SamplingParams(max_new_tokens=20)), ("drafted", SamplingParams(max_new_tokens=3))
    )
    assert batch.load_at([len(PROMPT) + 1] * 2).limits == (4, 1)


def test_the_load_is_the_same_object_until_a_row_comes_near_its_end() -> None:
    """A control that rests compares it in every round."""
    batch = batch_of(("drafted", SamplingParams(max_new_tokens=20)))
    assert batch.load_at([5]) is batch.load_at([9])


def test_rows_that_sample_ask_or_have_penalties_are_known_from_the_start() -> None:
    greedy, asks = SamplingParams(), SamplingParams(temperature=1.0, logprobs=2, presence_penalty=0.5)
    batch = batch_of(("drafted", greedy), ("plain", asks))
    assert batch.load.kinds == (("drafted", False), ("plain", True))
    assert batch.asked == {1: 2}
    assert batch.penalised
    assert not batch_of(("drafted", greedy)).penalised
