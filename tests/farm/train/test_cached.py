"""The cached form sees the very positions and values of the first unrolled step, in an order of its own."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from farm.data.features import Sample
from farm.draft.config import DraftConfig
from farm.draft.model import Draft, DraftHead, new_draft
from farm.sections import AdaptSettings
from farm.train.batches import Batch, collate
from farm.train.cached import Positions, bytes_of, cache_positions
from farm.train.course import Course, rows_at_once, split_held_out
from farm.train.unroll import unroll

CONFIG = DraftConfig(16, 2, 1, 8, 24, 20, 1e-6, 10_000.0, 32)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    lengths = [9, 14, 6, 11, 8, 7]
    return [
        Sample(
            torch.randint(0, 32, (n,), generator=generator), torch.randn(n - 1, 16, generator=generator), 3
        )
        for n in lengths
    ]


@pytest.fixture(scope="module")
def draft() -> Draft:
    return new_draft(CONFIG, seed=2, std=0.3).requires_grad_(False)


@pytest.fixture(scope="module")
def positions(samples: list[Sample], draft: Draft) -> Positions:
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    head = DraftHead(weight, weight, None)
    return cache_positions(draft.trunk, head, list(enumerate(samples)), batch_rows=4, prompt_tokens=False)


def test_an_expert_on_cached_positions_predicts_what_the_first_unrolled_step_does(
    samples: list[Sample], draft: Draft, positions: Positions
) -> None:
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    batch = collate(samples)
    embedded = DraftHead(weight, weight, None).embed(batch.next_tokens_BT)
    predicted = unroll(draft, embedded, batch.hidden_BTH, 1)[0]
    cached = positions.residual_MH + draft.expert(positions.normed_MH)
    assert len(positions) == int(batch.mask(0).sum())
    for row, (number, index) in enumerate(zip(*vars(positions.at).values(), strict=True)):
        torch.testing.assert_close(cached[row], predicted[number, index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(positions.hidden_MH[row], samples[number].features_TH[index + 1])


@pytest.mark.parametrize("prompt_tokens", [False, True])
def test_prompts_are_cached_where_they_are_trained_on(
    samples: list[Sample], draft: Draft, prompt_tokens: bool
) -> None:
    """The very positions of whole rows, once each."""
    weight = torch.randn(32, 16, generator=torch.Generator().manual_seed(1))
    found = cache_positions(
        draft.trunk, DraftHead(weight, weight, None), list(enumerate(samples)), batch_rows=4,
        prompt_tokens=prompt_tokens,
    )  # fmt: skip
    expected = collate(samples, prompt_tokens=prompt_tokens).where(0)
    assert sorted(found.at.uid_M.tolist()) == sorted(expected.uid_M.tolist())


@pytest.mark.parametrize("form", ["cached", "unrolled", "cached-unrolled"])
@pytest.mark.parametrize("micro_rows", [None, 1])
def test_ranks_and_micro_batches_share_out_the_same_positions(
    samples: list[Sample], positions: Positions, form: str, micro_rows: int | None
) -> None:
    settings = AdaptSettings(
        form=form, epochs=2, cached_epochs=3, batch_rows=4, cached_tokens=10, micro_rows=micro_rows
    )
    cached = None if form == "unrolled" else positions
    alone = Course(samples, range(6), settings, cached)
    shared = Course(samples, range(6), settings, cached, world=2)
    assert alone.num_steps == shared.num_steps
    for step in range(alone.num_steps):
        assert len(alone.batches(step, 0)) == alone.num_micro
        together = [uid for rank in range(2) for uid in uids(shared.batches(step, rank))]
        assert sorted(together) == sorted(uids(alone.batches(step, 0)))
        assert len(set(together)) == len(together)
    kinds = [type(alone.batches(step, 0)[0]) for step in range(alone.num_steps)]
    assert kinds == sorted(kinds, key=lambda kind: kind is Batch)  # cached first, rows last
    assert (Positions in kinds, Batch in kinds) == ("cached" in form, "unrolled" in form)


def uids(batches: list[Batch | Positions]) -> list[int]:
    at = [batch.at if isinstance(batch, Positions) else batch.where(0) for batch in batches]
    return [uid for where in at for uid in where.uid_M.tolist()]


def test_every_position_is_seen_once_in_an_epoch_of_full_batches(
    samples: list[Sample], positions: Positions
) -> None:
    settings = AdaptSettings(form="cached", epochs=1, cached_tokens=len(positions) // 3)
    course = Course(samples, range(6), settings, positions)
    seen = [uid for step in range(course.num_steps) for uid in uids(course.batches(step, 0))]
    assert len(seen) == len(set(seen)) == len(positions) // 3 * 3


@pytest.mark.parametrize(
    ("rows", "world", "micro_rows", "num_micro"),
    [
        (16, 3, None, 1),
        (16, 3, 2, 3),
        (16, 3, 6, 1),
        (16, 3, 5, 2),
        (16, 4, 2, 2),
        (4, 4, 1, 1),
        (5, 4, 1, 1),
    ],
)
def test_a_batch_is_cut_only_where_a_worker_has_more_rows_than_it_takes_at_once(
    draft: Draft, rows: int, world: int, micro_rows: int | None, num_micro: int
) -> None:
    """A worker with a row less than others has to have one in each part."""
    samples = [Sample(torch.zeros(9, dtype=torch.int64), torch.zeros(8, 16), 3)] * 20
    course = Course(
        samples, range(20), AdaptSettings(batch_rows=rows, micro_rows=micro_rows), None, world=world
    )
    assert course.num_micro == num_micro
    for rank in range(world):
        assert all(len(batch.sample_B) for batch in course.batches(0, rank))


def test_no_pass_takes_more_rows_than_are_taken_at_once(samples: list[Sample]) -> None:
    for settings, most in (({}, 6), ({"micro_rows": 2}, 2), ({"micro_rows": 9, "batch_rows": 4}, 4)):
        asked = AdaptSettings(**settings)
        sizes = [len(batch.sample_B) for batch in Course(samples, range(6), asked, None).whole(range(6), 0)]
        assert (max(sizes), sum(sizes)) == (most, 6)
        assert min(rows_at_once(asked), 6) == most


def test_caching_holds_what_it_is_said_to_take_once(draft: Draft) -> None:
    """All batches' parts beside their concatenation would be twice as much."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        Sample(
            torch.randint(0, 32, (101,), generator=generator), torch.randn(100, 16, generator=generator), 1
        )
        for _ in range(60)
    ]
    weight = torch.randn(32, 16, generator=generator)
    held = most = 0
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        cache_positions(
            draft.trunk,
            DraftHead(weight, weight, None),
            list(enumerate(rows)),
            batch_rows=1,
            prompt_tokens=False,
        )
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    told = bytes_of(rows, torch.float32)
    assert told / 2 < most < 1.4 * told


def test_operations_counted_at_a_few_steps_stand_for_all(samples: list[Sample], positions: Positions) -> None:
    settings = AdaptSettings(form="cached-unrolled", epochs=7, cached_epochs=3, batch_rows=2, cached_tokens=5)
    course = Course(samples, range(6), settings, positions)
    weights = [course.counts_flops(step, 4) for step in range(course.num_steps)]
    assert sum(weights) == course.num_steps
    assert sum(weights[: course.num_cached]) == course.num_cached
    assert 0 < sum(weight > 0 for weight in weights) <= 8


def test_held_out_rows_are_not_trained_on_and_follow_from_the_seed_alone() -> None:
    settings = AdaptSettings(early_stop={"held_out": 0.2}, seed=4)
    train, held_out = split_held_out(range(20), settings)
    assert sorted(train + held_out) == list(range(20))
    assert len(held_out) == 4
    assert split_held_out(list(reversed(range(20))), settings) == (train, held_out)
    assert split_held_out(range(20), AdaptSettings()) == (list(range(20)), [])


@pytest.mark.parametrize("share", [0.01, 0.5])
def test_of_the_fewest_rows_one_is_held_out_and_one_is_left_to_train_on(share: float) -> None:
    settings = AdaptSettings(early_stop={"held_out": share})
    assert split_held_out([7], settings) == ([7], [])
    assert [len(part) for part in split_held_out([3, 5], settings)] == [1, 1]
