"""Caches over methods: what they remember, and that nothing stays alive because of them."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from farm.decode.controls import make_control
from farm.decode.engine import Engine, Request, Route
from farm.decode.remembered import remembered
from farm.decode.sampling import SamplingParams
from tests.farm.models import tiny_pair


class Adder:
    def __init__(self) -> None:
        self.calls = 0
        self.add = remembered(2, self._add_anew)

    def _add_anew(self, left: int, right: int) -> int:
        self.calls += 1
        return left + right


@pytest.fixture
def no_collector() -> Iterator[None]:
    """References alone free what is dropped."""
    gc.disable()
    yield
    gc.enable()


def test_the_last_results_are_kept() -> None:
    adder = Adder()
    assert [adder.add(1, 2), adder.add(1, 2), adder.add(3, 4), adder.add(1, 2)] == [3, 3, 7, 3]
    assert adder.calls == 2
    adder.add(5, 6)
    adder.add(3, 4)
    assert adder.calls == 4


@pytest.mark.usefixtures("no_collector")
def test_an_object_goes_with_its_last_reference() -> None:
    adder = Adder()
    adder.add(1, 2)
    watched = weakref.ref(adder)
    del adder
    assert watched() is None


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("drafted", [False, True], ids=["plain", "drafted"])
def test_an_engine_that_is_dropped_frees_its_caches_at_once(drafted: bool) -> None:
    """Regeneration makes one for each shard, whose caches would stay until the collector comes."""
    target, draft = tiny_pair(seed=1)
    route = Route(target, frozenset(), draft if drafted else None)
    engine = Engine([route], num_slots=2, max_length=64, k=3, control=make_control("cost", 3))
    engine.run([Request("a", (1, 2, 3), SamplingParams(max_new_tokens=8))])
    watched = [weakref.ref(one) for one in (engine, engine.runner, engine.runner.cache)]
    if engine.runner.drafting is not None:
        watched += [weakref.ref(engine.runner.drafting), weakref.ref(engine.runner.drafting._drafts)]
    assert len(watched) == (5 if drafted else 3)
    del engine
    assert [one() for one in watched] == [None] * len(watched)
