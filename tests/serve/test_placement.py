"""Packing targets into replicas: within the budget, nobody forgotten, what can be shared is shared."""

from hypothesis import given
from hypothesis import strategies as st

from serve.placement import GIB, Group, Need, Packed, pack

TRUNK = 5


@st.composite
def families(draw: st.DrawFn) -> list[Need]:
    """Targets over a few checkpoints; a checkpoint has one size and one shape, a shape one cache."""
    checkpoints = [
        (f"c{index}", draw(st.integers(1, 40)), draw(st.integers(0, 1)))
        for index in range(draw(st.integers(1, 4)))
    ]
    caches = [draw(st.integers(0, 10)) for _ in range(2)]
    needs = []
    for index in range(draw(st.integers(0, 10))):
        name, size, shape = draw(st.sampled_from(checkpoints))
        needs.append(Need(f"t{index}", name, size, draw(st.integers(0, 8)), shape, caches[shape]))
    return needs


def over_budget(groups: list[Group], budget: int) -> list[Group]:
    return [group for group in groups if not group.needs or group.num_bytes > budget]


def held_too_often(needs: list[Need], packed: Packed, budget: int) -> list[str]:
    """Checkpoints that several groups hold although one replica has room for all who share them."""
    names = []
    for name in sorted({need.checkpoint for need in needs}):
        sharers = tuple(n for n in needs if n.checkpoint == name and n.target not in packed.refused)
        holders = [group for group in packed.groups if {n.checkpoint for n in group.needs} & {name}]
        if Group(sharers, TRUNK).num_bytes <= budget and len(holders) > 1:
            names.append(name)
    return names


@given(needs=families(), budget=st.integers(1, 120))
def test_every_target_is_placed_within_the_budget_or_refused(needs, budget):
    packed = pack(needs, TRUNK, budget)
    placed = [target for group in packed.groups for target in group.targets]
    assert sorted([*placed, *packed.refused]) == sorted(need.target for need in needs)
    assert set(packed.refused) == {n.target for n in needs if Group((n,), TRUNK).num_bytes > budget}
    assert not over_budget(packed.groups, budget)
    assert not held_too_often(needs, packed, budget)


@given(needs=families())
def test_without_a_budget_all_targets_are_together(needs):
    packed = pack(needs, TRUNK, None)
    assert not packed.refused
    assert [len(group.needs) for group in packed.groups] == ([len(needs)] if needs else [])


def test_what_targets_share_is_counted_once():
    shared = [Need("a", "c", 10, 1, "s", 6, 4), Need("b", "c", 10, 2, "s", 6, 7)]
    group = Group((*shared, Need("d", "e", 20, 3, "t", 5, 1)), TRUNK)
    assert group.weight_bytes == 10 + 20 + 1 + 2 + 3
    assert group.cache_bytes == 6 + 5
    assert group.mixture_bytes == 7 + 1
    assert group.num_bytes == TRUNK + 36 + 11 + 8


def test_a_packing_that_takes_targets_one_by_one_is_noticed():
    """Three LoRAs of one checkpoint fit together; a placement that forgets it holds the checkpoint twice."""
    needs = [Need(f"t{i}", "c", 10, 1, "s", 1) for i in range(3)]
    apart = Packed([Group((need,), TRUNK) for need in needs])
    assert held_too_often(needs, apart, budget=30) == ["c"]
    assert held_too_often(needs, pack(needs, TRUNK, 30), budget=30) == []
    assert over_budget(apart.groups, budget=15) == apart.groups


def test_a_target_that_fits_nowhere_is_refused_with_both_numbers_and_alone():
    needs = [Need("huge", "c", 8 * GIB, 0, "s", 0), Need("small", "d", GIB, 0, "s", 0)]
    packed = pack(needs, 0, 2 * GIB)
    assert [group.targets for group in packed.groups] == [("small",)]
    assert "huge needs 8 GiB" in packed.refused["huge"]
    assert "memory_gib is 2" in packed.refused["huge"]


def test_a_checkpoint_whose_loras_do_not_fit_into_one_replica_is_split():
    needs = [Need(f"t{i}", "c", 10, 6, "s", 1) for i in range(4)]
    packed = pack(needs, TRUNK, 30)
    assert [len(group.needs) for group in packed.groups] == [2, 2]


def test_targets_of_one_shape_come_together_where_both_would_fit():
    needs = [Need("a", "a", 20, 0, "s", 10), Need("b", "b", 19, 0, "t", 10), Need("c", "c", 5, 0, "t", 10)]
    packed = pack(needs, 0, 35)
    assert sorted(sorted(group.targets) for group in packed.groups) == [["a"], ["b", "c"]]
