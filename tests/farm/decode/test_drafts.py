"""Weights that batches of drafts need: when a target's changes are put into the trunk, and for how long."""

import gc
import weakref

import pytest

from farm.decode.drafts import KEPT_TRUNKS, ROUNDS_BY_ROW, Drafts
from farm.decode.routes import Route, Routes
from farm.draft.lean import LeanTrunk
from farm.draft.model import Draft
from tests.farm.models import random_delta, tiny_pair

NUM_TARGETS = KEPT_TRUNKS + 1


def changed_drafts() -> tuple[Drafts, list[Draft]]:
    """Targets that change the trunk, each in its own way."""
    target, first = tiny_pair(seed=1)
    hosted, drafts = Routes(), []
    for seed in range(NUM_TARGETS):
        delta = random_delta(first.config, {"fc": 2, "qkv": 2, "out": 2}, seed)
        drafts.append(Draft(first.trunk, first.expert, delta))
        hosted.host(Route(target, frozenset(), drafts[-1], target=f"t{seed}"))
    return Drafts(drafts[0], hosted), drafts


def test_a_row_that_catches_up_in_a_mixture_has_no_trunk_made_for_it() -> None:
    """An endpoint made one for every request that joined: 17 MB of rotary tables and a packed trunk each."""
    drafts, _ = changed_drafts()
    if drafts._trunk.alone is None:
        pytest.skip("without kernels rows of one target always take their own trunk")
    for seed in range(NUM_TARGETS):
        for _ in range(ROUNDS_BY_ROW + 1):
            drafts.bind((f"t{seed}",), True)
    assert drafts._changed.cache_info().misses == 0


def test_a_target_has_a_trunk_made_once_many_rounds_were_its_alone() -> None:
    """The tail of every mixture folded and packed one for a few rounds."""
    drafts, each = changed_drafts()
    if drafts._trunk.alone is None:
        pytest.skip("without kernels rows of one target always take their own trunk")

    def rounds(num: int, *targets: str) -> LeanTrunk:
        """That of the last of them."""
        for _ in range(num):
            draft, _ = drafts.bind(targets)
        return draft._lean

    for _ in range(3):
        assert rounds(ROUNDS_BY_ROW, "t0") is drafts._trunk
        assert rounds(1, "t1", "t0", "t0") is drafts._trunk
    assert rounds(ROUNDS_BY_ROW // 2, "t0", "t0") is drafts._trunk
    assert drafts._changed.cache_info().misses == 0
    made = rounds(ROUNDS_BY_ROW // 2 + 1, "t0")  # another number of rows is the same target
    assert made is not drafts._trunk
    assert rounds(1, "t1") is drafts._trunk
    assert rounds(1, "t0", "t0") is made  # it is there
    assert drafts._changed.cache_info().misses == 1
    del made
    drafts.forget()
    assert rounds(1, "t0") is drafts._trunk


def test_a_changed_trunk_is_freed_when_others_take_its_place_and_has_no_tables_of_its_own() -> None:
    drafts, each = changed_drafts()
    gc.disable()
    try:
        assert each[0].delta is not None
        lean = drafts._changed(each[0].delta)
        assert all(own is shared for own, shared in zip(lean.tables, drafts.tables, strict=True))
        watched = weakref.ref(lean)
        del lean
        assert watched() is not None
        for other in each[1:]:
            drafts._changed(other.delta)
        assert watched() is None
    finally:
        gc.enable()
