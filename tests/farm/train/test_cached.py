"""The cached form sees the very positions and values of the first unrolled step, in an order of its own."""

import pytest
import torch

from farm.data.features import Sample
from farm.draft.config import DraftConfig
from farm.draft.model import Draft, DraftHead, new_draft
from farm.sections import AdaptSettings
from farm.train.batches import Batch, collate
from farm.train.cached import Positions, cache_positions
from farm.train.course import Course, split_held_out
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
