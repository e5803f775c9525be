"""What rounds teach of acceptance, and what it promises for a batch."""

import pytest

from farm.decode.acceptance import Known
from farm.decode.control import Load, RoundResult
from farm.decode.growth import bin_of

UNKNOWN = Known(3)["a", False].by_position[0].value


def test_a_batch_survives_as_its_rows_do_each_up_to_its_own_limit() -> None:
    known = Known(3)
    for _ in range(20):
        known.learn(RoundResult(Load(("good",), (3,)), (3,), (3,), (4,), 3, 0.1, 1.0, [[0.9]] * 3))
    good, unknown = known["good", False].mean_survival(), known["other", False].mean_survival()
    assert good[0] > unknown[0]
    found = known.mean_survival(Load(("good", "other", "other"), (3, 1, 2)))
    first, second = good[0] + 2 * unknown[0], good[1] + unknown[1]
    assert found == pytest.approx([first / 3, second / 3, good[2] / 3])


def test_each_row_teaches_what_its_own_peak_is_worth() -> None:
    """The unsure row is refused, the sure one accepted."""
    known = Known(3)
    before = known["a", False].by_peak.table()
    known.learn(RoundResult(Load(("a", "a"), (1, 1)), (1, 1), (0, 1), (1, 2), 1, 0.1, 1.0, [[0.3, 0.8]]))
    pairs = zip(before, known["a", False].by_peak.table(), strict=True)
    moved = {index: new - old for index, (old, new) in enumerate(pairs) if new != old}
    assert set(moved) == {bin_of(0.3, 16), bin_of(0.8, 16)}
    assert moved[bin_of(0.3, 16)] < 0 < moved[bin_of(0.8, 16)]


@pytest.mark.parametrize(
    ("limit", "drafted", "accepted", "emitted", "taught"),
    [
        (3, 2, 2, 3, [True, True, True]),  # the third was drafted and dropped
        (3, 2, 1, 2, [True, True, False]),  # refused before it
        (3, 2, 2, 2, [True, True, False]),  # a stop came before it
        (2, 2, 2, 3, [True, True, False]),  # it was drafted for other rows
        (3, 3, 3, 1, [True, False, False]),
        (3, 3, 0, 1, [True, False, False]),
    ],
)
def test_a_position_teaches_where_a_row_came_to_it(
    limit: int, drafted: int, accepted: int, emitted: int, taught: list[bool]
) -> None:
    known = Known(3)
    load = Load(("a",), (limit,))
    known.learn(RoundResult(load, (drafted,), (accepted,), (emitted,), 3, 0.1, 1.0, [[0.9]] * 3))
    assert [ratio.value != UNKNOWN for ratio in known["a", False].by_position] == taught
