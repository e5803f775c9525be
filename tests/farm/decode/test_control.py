"""Draft lengths: what each control decides, what it learns from, and that it never looks at a drawn token."""

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from pydantic import ValidationError

from farm.decode.acceptance import AcceptanceByPeak
from farm.decode.adaedl import AdaEDL
from farm.decode.control import Control, Fixed, Load, RoundResult
from farm.decode.controls import make_control
from farm.decode.costs import RoundCosts
from farm.decode.growth import Growing, Growth, Rule
from farm.decode.renewal import Cost
from farm.sections import ServeSettings


def load_of(rows: int) -> Load:
    return Load(("",) * rows, (8,) * rows)


def took(rows: int, length: int, draft_s: float, rest_s: float) -> RoundResult:
    return RoundResult(load_of(rows), (length,) * rows, (0,) * rows, (1,) * rows, length, draft_s, rest_s)


def plus_one(accepted: Sequence[int]) -> tuple[int, ...]:
    """What rows emit that no stop cuts."""
    return tuple(num + 1 for num in accepted)


def steady(seconds: float) -> float:
    del seconds
    return 1.0


class Unsteady:
    """A machine that others use too: how many times as long a round takes; its pace changes every 100 s or so."""

    def __init__(self, seed: int) -> None:
        self._rng, self._pace, self._left = random.Random(seed), 1.0, 0.0

    def __call__(self, seconds: float) -> float:
        self._left -= seconds
        if self._left < 0:
            self._pace, self._left = self._rng.choice([1.0, 1.0, 1.3, 1.8]), self._rng.expovariate(0.01)
        stutter = self._rng.uniform(2, 6) if self._rng.random() < 0.01 else 1.0
        return self._pace * stutter * self._rng.lognormvariate(0, 0.1)


def play(  # noqa: PLR0913 - a machine, each property with a name
    control: Control,
    alpha: Callable[[float], float],
    *,
    rounds: int,
    rows: int = 1,
    step: float = 0.1,
    verify_step: float | None = None,
    pace: Callable[[float], float] = steady,
    seed: int = 0,
) -> tuple[float, float]:
    """Plays rounds against a made-up machine; mean drafted tokens and tokens a second of the second half.

    A plain round takes 1 s, every verified token `verify_step` s more (as much as `step` if not given), a draft
    forward `step` s. A draft's largest probability is uniform in [0, 1]; its token is accepted with `alpha` of that.
    The control sees seconds times `pace`; those that are returned are without it.
    """
    rng = random.Random(seed)
    verify_step = step if verify_step is None else verify_step
    drafted_sum = emitted = seconds = 0.0
    for number in range(rounds):
        limit, kept, forwards = control.limit(load_of(rows)), [0] * rows, 0
        going, peaks = [True] * rows, list[list[float]]()
        for index in range(limit):
            if index and not control.more(index):
                break
            forwards += 1
            peaks.append([rng.random() for _ in range(rows)])
            signal = [0.0] * rows if control.signal == "none" else peaks[-1]
            if control.signal == "entropy":
                signal = [4 * (1 - peak) for peak in peaks[-1]]
            going = [g and k for g, k in zip(going, control.keep(index, signal), strict=True)]
            if not any(going):
                break
            kept = [n + g for n, g in zip(kept, going, strict=True)]
        accepted = []
        for row in range(rows):
            hits = (rng.random() < alpha(peaks[i][row]) for i in range(kept[row]))
            accepted.append(next((i for i, hit in enumerate(hits) if not hit), kept[row]))
        draft_s, rest_s = step * forwards, 1 + verify_step * max(kept)
        slow, load = pace(draft_s + rest_s), load_of(rows)
        control.observe(
            RoundResult(
                load,
                tuple(kept),
                tuple(accepted),
                plus_one(accepted),
                forwards,
                slow * draft_s,
                slow * rest_s,
                peaks,
            )
        )
        if number >= rounds // 2:
            drafted_sum += sum(kept) / rows
            emitted, seconds = emitted + sum(accepted) + rows, seconds + draft_s + rest_s
    return drafted_sum / (rounds - rounds // 2), emitted / seconds


@pytest.mark.parametrize("name", ["off", "fixed", "fixed-7", "adaedl", "adaedl-published", "cost"])
def test_every_documented_name_is_a_control(name: str) -> None:
    assert make_control(name).limit(load_of(1)) >= 0


@pytest.mark.parametrize("values", [{"k": 64}, {"k": 8, "control": "fixed-64"}])
def test_no_setting_drafts_more_than_targets_know_positions_for(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="63"):
        ServeSettings.model_validate(values)
    assert ServeSettings(k=63, control="fixed-63").k == 63


@pytest.mark.parametrize("name", ["", "fixed-", "fixed-x", "fixed-0", "adaedl-2", "cost-3", "auto"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match="none of off, fixed"):
        make_control(name)


def test_the_published_threshold_runs_away_and_ours_does_not() -> None:
    """Mean acceptance far below 0.9: as published, lambda climbs past 1 and one token a round is left."""
    published, ours = AdaEDL(6, published=True), AdaEDL(6)
    length_published, _ = play(published, lambda peak: 0.4 + 0.5 * peak, rounds=8000)
    length_ours, _ = play(ours, lambda peak: 0.4 + 0.5 * peak, rounds=8000)
    assert published.thresholds["", False].value > 1.0
    assert length_published == pytest.approx(1.0)
    assert 0.2 <= ours.thresholds["", False].value <= 0.9
    assert length_ours > 1.3


def test_what_lies_behind_a_stop_says_nothing_about_acceptance() -> None:
    """Two of six were kept, and both were right: the four behind the stop might have been."""
    cut, whole = AdaEDL(6, published=True), AdaEDL(6, published=True)
    cut.observe(RoundResult(load_of(2), (6, 4), (3, 1), (2, 2), 6, 1.0, 1.0))
    whole.observe(RoundResult(load_of(2), (2, 4), (2, 1), (3, 2), 6, 1.0, 1.0))
    assert cut.thresholds == whole.thresholds


@pytest.mark.parametrize(("alpha", "step"), [(0.9, 0.02), (0.7, 0.1), (0.5, 0.05), (0.6, 0.4)])
@pytest.mark.parametrize("rows", [1, 6])
def test_cost_is_as_fast_as_the_best_fixed_length(alpha: float, step: float, rows: int) -> None:
    """Where the draft's certainty says nothing, the best fixed length is the best there is."""
    expected = [sum(alpha**i for i in range(k + 1)) * rows / (1 + 2 * step * k) for k in range(9)]
    _, rate = play(Cost(8), lambda _: alpha, rounds=3000, rows=rows, step=step)
    assert rate > 0.95 * max(expected)


def test_cost_takes_a_slow_moment_of_the_machine_for_no_property_of_a_length() -> None:
    """Four tokens pay by 1.8; without a common pace the rule rests, or drafts one token, for much of some runs."""
    machine = {"rounds": 700, "step": 0.25, "verify_step": 0.065}
    best = sum(0.875**i for i in range(5)) / (1 + 4 * 0.315)
    for seed in range(8, 12):
        _, rate = play(Cost(8), lambda peak: 0.8 + 0.15 * peak, pace=Unsteady(seed), seed=seed, **machine)
        assert rate > 0.9 * best


def test_cost_beats_every_fixed_length_where_the_drafts_certainty_tells_something() -> None:
    best = max(play(Fixed(k), lambda peak: peak, rounds=6000)[1] for k in range(9))
    _, rate = play(Cost(8), lambda peak: peak, rounds=6000)
    assert rate > 1.01 * best  # knowing everything, the rule would reach 1.03


def test_cost_switches_speculation_off_where_it_does_not_pay_and_on_again_where_it_does() -> None:
    control = Cost(8)
    length, rate = play(control, lambda peak: 0.02, rounds=2000)
    assert length < 0.1
    assert rate > 0.97  # plain decoding has 1 token a second here
    length, _ = play(control, lambda peak: 0.9, rounds=4000)
    assert length > 2


def survival_after(results: Iterable[RoundResult]) -> list[float]:
    """What a control has learned of acceptance by position, as the rule of a round that drafts says it."""
    control = Cost(8)
    for result in results:
        control.observe(result)
    return [ratio.value for ratio in control._known["", False].by_position]


def test_a_position_that_was_drafted_and_dropped_counts_as_what_its_peak_says() -> None:
    """A sixth of all positions is unsure, never verified and hardly ever right: the next one is still one of them."""
    rng, results = random.Random(0), []
    for _ in range(3000):
        peak = 0.1 if rng.random() < 1 / 6 else 0.9
        hit = rng.random() < peak
        verified = peak > 0.5
        accepted = (int(verified and hit),)
        results.append(
            RoundResult(load_of(1), (int(verified),), accepted, plus_one(accepted), 1, 0.1, 1.0, [[peak]])
        )
    truth = 5 / 6 * 0.9 + 1 / 6 * 0.1
    assert survival_after(results)[0] == pytest.approx(truth, abs=0.04)


def test_tokens_behind_a_stop_teach_nothing() -> None:
    """Every round ends with an accepted stop at the second of four drafted tokens; those behind it are refused."""
    stopped = RoundResult(load_of(1), (4,), (2,), (2,), 4, 0.4, 1.0, [[0.9]] * 4)
    assert stopped.tokens == 2
    first, second, third, *_ = survival_after([stopped] * 50)
    assert min(first, second) > 0.9
    assert third == survival_after([])[2]


def test_a_rule_is_not_made_anew_because_a_request_nears_its_end() -> None:
    control = Cost(8)
    play(control, lambda peak: 0.9, rounds=400)
    rules = set[int]()
    for limit in range(8, 2, -1):
        load = Load(("",), (limit,))
        control.limit(load)
        if control.growth is not None and len(control.growth.rule.accepted[0]) > 1:  # no trial
            assert control.growth.limits == (limit,)
            rules.add(id(control.growth.rule))
        control.observe(RoundResult(load, (0,), (0,), (1,), 0, 0.0, 1.0))
    assert len(rules) <= 2  # of six rounds; every eighth makes one


def test_lengths_that_no_request_allows_are_not_waited_for() -> None:
    """Requests of at most two tokens: after a few looks the rule decides, though four and eight were never seen."""
    control, load = Cost(8), Load(("", ""), (2, 1))
    for _ in range(40):
        most = min(control.limit(load), 2)
        for index in range(most):
            control.keep(index, [0.5, 0.5])
        signals = [[0.5, 0.5]] * most
        lengths, seconds = (most, min(most, 1)), (0.1 * most, 1 + 0.3 * most)
        control.observe(RoundResult(load, lengths, (0, 0), (1, 1), most, *seconds, signals))
    assert control.limit(load) == 0


def test_costs_of_a_token_come_from_all_lengths_and_an_outlier_moves_them_little() -> None:
    costs = RoundCosts(8)
    for _ in range(5):
        for length in (0, 1, 4, 8):
            costs.add(took(3, length, 0.1 * length, 1.0 + 0.2 * length))
    costs.add(took(4, 4, 50.0, 50.0))  # three and four rows share a bucket
    assert costs.draft_step(load_of(4)) == pytest.approx(0.1, abs=0.03)
    assert costs.verify_step(load_of(3)) == pytest.approx(0.2, abs=0.06)
    assert costs.unexplored(load_of(3)) == ()
    assert costs.unexplored(load_of(1)) == (1, 4, 8)


def test_one_stutter_at_a_length_that_is_rarely_tried_moves_no_price() -> None:
    costs = RoundCosts(8)
    for _ in range(3):
        for length in (0, 1, 4, 8):
            costs.add(took(8, length, 0.1 * length, 1.0 + 0.2 * length))
    costs.add(took(8, 7, 0.7, 175.0))
    assert costs.verify_step(load_of(8)) == pytest.approx(0.2)


def test_rows_that_were_not_looked_at_yet_cost_what_their_tokens_do() -> None:
    """Four rows and eight are known; three go by the table of four, one by that of four, sixteen by that of eight."""
    costs = RoundCosts(8)
    for rows in (4, 8):
        for _ in range(3):
            for length in (0, 1, 4, 8):
                costs.add(took(rows, length, 0.1 * length, 1.0 + 0.01 * rows * (1 + length)))
        assert costs.unexplored(load_of(rows)) == ()
    assert [costs.source(load_of(rows)) for rows in (1, 3, 8, 16)] == [(4, 1), (4, 1), (8, 1), (8, 1)]
    for rows in (1, 3, 6, 16):
        assert costs.verify_step(load_of(rows)) == pytest.approx(0.01 * rows)
        assert 1 / costs.plain(load_of(rows)) == pytest.approx(1.0 + 0.01 * rows)
        assert costs.seconds(took(rows, 3, 0.0, 0.0)) == pytest.approx(0.3 + 1.0 + 0.04 * rows)


def test_rows_that_two_forwards_verify_are_not_priced_by_those_of_one() -> None:
    costs = RoundCosts(8)
    for _ in range(3):
        for length in (0, 1, 4, 8):
            costs.add(took(8, length, 0.1 * length, 1.0 + 0.2 * length))
    assert costs.unexplored(load_of(8)) == ()
    apart = replace(load_of(4), num_groups=2)
    assert (costs.source(load_of(4)), costs.source(apart)) == ((8, 1), (4, 2))
    assert costs.unexplored(apart) == (1, 4, 8)


def test_a_tail_of_five_rows_is_no_fast_machine() -> None:
    """Five and eight rows share a bucket: rounds of five are shorter, and the pace stays what it was."""
    costs = RoundCosts(8)
    for rows in (8,) * 20 + (5,) * 20:
        for length in (0, 1, 4, 8):
            costs.add(took(rows, length, 0.1 * length, 0.2 + 0.1 * rows * (1 + length)))
    assert costs.now(load_of(8), 1.0) == pytest.approx(1.0)
    assert costs.verify_step(load_of(8)) == pytest.approx(0.8)
    assert 1 / costs.plain(load_of(8)) == pytest.approx(1.0)


@pytest.mark.parametrize("first", [3.0, 0.3])
def test_a_first_look_that_is_an_outlier_sets_no_scale(first: float) -> None:
    """Were the pace told from one look, all that follow would be taken for a fast machine, for ever."""
    costs = RoundCosts(8)
    costs.add(took(8, 1, 0.1 * first, 1.2 * first))
    for _ in range(12):
        for length in (0, 1, 4, 8):
            costs.add(took(8, length, 0.1 * length, 1.0 + 0.2 * length))
    assert costs.verify_step(load_of(8)) == pytest.approx(0.2)
    assert costs.now(load_of(8), 1.0) == pytest.approx(1.0)


def test_requests_near_their_end_are_not_explored_length_by_length() -> None:
    """All lengths of eight rows are known; rounds that may draft 7, 6, 5 find nothing left to try."""
    costs = RoundCosts(8)
    for _ in range(3):
        for length in (0, 1, 4, 8):
            costs.add(took(8, length, 0.1 * length, 1.0 + 0.2 * length))
    assert [costs.unexplored(Load(("",) * 8, (most,) * 8)) for most in (8, 7, 6, 5, 4)] == [()] * 5


def test_a_token_breaks_even_where_its_acceptance_times_its_rows_buys_its_seconds() -> None:
    """Rounds of 1 + 0.3 k seconds: at 10 tokens a second, 4 rows pay for 0.3 s from acceptance 0.75 on."""
    costs = RoundCosts(8)
    assert costs.break_even(load_of(4), 10.0) is None
    for length in (0, 2, 6):
        costs.add(took(4, length, 0.1 * length, 1.0 + 0.2 * length))
    assert costs.break_even(load_of(4), 10.0) == pytest.approx(10.0 * 0.3 / 4)


def test_the_price_of_a_token_is_known_though_every_round_is_noisy() -> None:
    """Rounds within 30 % of 1 + 0.05 k: neighbouring means often differ by more than they should, a line does not."""
    rng, costs = random.Random(0), RoundCosts(8)
    for _ in range(40):
        for length in range(9):
            noise = rng.uniform(0.7, 1.3)
            costs.add(took(1, length, 0.03 * length * noise, (1 + 0.05 * length) * noise))
    assert costs.verify_step(load_of(1)) == pytest.approx(0.05, rel=0.5)
    assert costs.draft_step(load_of(1)) == pytest.approx(0.03, rel=0.3)


def drafted_by_round(
    control: Control, loads: Iterable[Load], alpha: Callable[[str, int], float], seed: int = 0
) -> list[tuple[str, int]]:
    """The first row's target and drafted tokens of every round, on a machine as that of `play`.

    `alpha` gives the acceptance of a target's tokens in a round; a draft says nothing about itself.
    """
    rng, said = random.Random(seed), list[tuple[str, int]]()
    for number, load in enumerate(loads):
        limit, kept, forwards, peaks = control.limit(load), 0, 0, list[list[float]]()
        for index in range(limit):
            if index and not control.more(index):
                break
            forwards += 1
            peaks.append([0.5] * load.num_rows)
            if not control.keep(index, peaks[-1])[0]:
                break
            kept += 1
        accepted = []
        for target in load.targets:
            hits = (rng.random() < alpha(target, number) for _ in range(kept))
            accepted.append(next((i for i, hit in enumerate(hits) if not hit), kept))
        lengths, seconds = (kept,) * load.num_rows, (0.1 * forwards, 1 + 0.1 * kept)
        control.observe(
            RoundResult(load, lengths, tuple(accepted), plus_one(accepted), forwards, *seconds, peaks)
        )
        said.append((load.targets[0], kept))
    return said


def share(said: Sequence[tuple[str, int]], target: str = "") -> float:
    """Of the rounds of a target, those in which something was drafted."""
    of_target = [kept > 0 for name, kept in said if name == target]
    return sum(of_target) / len(of_target)


@pytest.mark.parametrize("every", [1, 3, 6, 50])
def test_a_look_that_other_numbers_of_rows_interrupt_is_finished_later(every: int) -> None:
    """Requests come and go: four and five rows are not priced alike, and a look takes five rounds."""
    loads = [load_of(4 + number // every % 2) for number in range(6000)]
    said = drafted_by_round(Cost(8), loads, lambda _, number: 0.02 if number < 600 else 0.9)
    assert share(said[300:600]) < 0.1
    assert share(said[3000:]) > 0.85


@pytest.mark.parametrize("catch_up_s", [0.0, 5.0, 30.0])
def test_looks_into_a_draft_that_does_not_pay_cost_little_whatever_it_has_to_read(catch_up_s: float) -> None:
    """Long sequences: the first round that drafts after a rest reads all that was said."""
    control, load, rested, lost = Cost(8), load_of(8), True, 0.0
    for number in range(24_000):
        limit = control.limit(load)
        for index in range(limit):
            control.keep(index, [0.5] * 8)
        seconds, behind = (0.1 * limit, 1 + 0.1 * limit), catch_up_s if limit and rested else 0.0
        zeros = (0,) * 8
        control.observe(
            RoundResult(load, (limit,) * 8, zeros, (1,) * 8, limit, *seconds, [[0.5] * 8] * limit, behind)
        )
        rested = not limit
        if number >= 12_000:
            lost += sum(seconds) + behind - 1
    assert lost < 0.02 * 12_000


@pytest.mark.parametrize("length", [40, 150, 400])
def test_a_target_that_is_drafted_badly_neither_rests_another_nor_is_drafted_for_because_of_it(
    length: int,
) -> None:
    """Answers of two targets in turn, a row each."""
    loads = [Load(("good", "bad")[number // length % 2 :][:1], (8,)) for number in range(4800)]
    said = drafted_by_round(Cost(8), loads, lambda target, _: 0.85 if target == "good" else 0.02)
    assert share(said[1200:], "good") > 0.85
    assert share(said[1200:], "bad") < 0.15


def test_sampled_rows_do_not_lower_what_is_hoped_of_greedy_ones_of_the_same_target() -> None:
    """A draft that always guesses the likeliest token, and seldom what is drawn; a request of either in turn."""
    loads = [Load(("a",), (8,), sampled=(bool(number // 40 % 2),)) for number in range(4800)]
    control = Cost(8)
    drafted_by_round(control, loads, lambda _, number: 0.1 if number // 40 % 2 else 0.95)
    greedy, sampled = (control._known["a", one].by_position[0].value for one in (False, True))
    assert greedy > 0.9
    assert sampled < 0.2


@pytest.mark.parametrize("seed", range(12))
def test_bursts_of_requests_for_good_and_bad_drafts_decode_on(seed: int) -> None:
    """All numbers of rows, limits and targets in any order: something is always known well enough to go on with."""
    rng, loads = random.Random(seed), list[Load]()
    while len(loads) < 1500:
        rows = rng.choice([1, 2, 3, 4, 5, 8, 9])
        targets = tuple(rng.choice("ab") for _ in range(rows))
        limits = tuple(rng.choice([0, 1, 3, 8, 8]) for _ in range(rows))
        loads += [Load(targets, limits)] * rng.randint(1, 40) if any(limits) else []
    said = drafted_by_round(Cost(8), loads, lambda target, _: 0.9 if target == "a" else 0.1, seed)
    assert len(said) == len(loads)


def test_a_plain_look_that_is_cut_off_forgets_no_price() -> None:
    """Forgotten before it was measured anew, it would be 0 seconds."""
    costs = RoundCosts(8)
    for _ in range(3):
        for length in (0, 1, 4, 8):
            costs.add(took(8, length, 0.1 * length, 1.0 + 0.2 * length))
    costs.forget_plain(load_of(8))
    assert costs.unexplored(load_of(8)) == ()
    assert costs.plain(load_of(8)) == pytest.approx(1.0)


def test_a_distribution_that_is_no_number_is_trusted_with_nothing() -> None:
    growth = Growth((8,), Rule([[0.0, 0.9]], [[1.0] * 8], [0.5] * 8, [0.5] * 8))
    assert not Growing(growth).keeps(0, [math.nan])
    assert Growing(growth).keeps(0, [0.8])
    known = AcceptanceByPeak()
    known.add(math.nan, 0.0)
    assert known.table()[0] < 1 / 32
