"""Arms of the benchmark of decoding: which there are, and how they are chosen."""

import itertools

import pytest

from farm.bench.arms import chosen, full_arms, quick_arms, with_trees, with_vllm


def test_the_full_run_has_every_batch_size_control_and_workload() -> None:
    arms = full_arms()
    assert {arm.batch for arm in arms} == {1, 2, 4, 8, 16}
    assert {"off", "fixed-4", "adaedl", "adaedl-published", "cost"} <= {arm.control for arm in arms}
    assert {arm.workload for arm in arms} == {"equal", "ragged"}
    assert len(set(arms)) == len(arms)


def test_vllm_has_two_arms_beside_those_of_each_batch_size_and_workload() -> None:
    arms = with_vllm(full_arms())
    assert [arm for arm in arms if arm.engine != "vllm"] == full_arms()
    assert len(set(arms)) == len(arms)
    places = [(arm.batch, arm.workload) for arm in arms]
    assert [place for place, _ in itertools.groupby(places)] == list(dict.fromkeys(places)), (
        "one block a place"
    )
    for place in set(places):
        found = [a for a in arms if a.engine == "vllm" and (a.batch, a.workload) == place]
        assert [(a.control, a.draft) for a in found] == [("off", "none"), ("ngram", "none")]


def test_a_tree_that_is_named_is_an_arm_of_every_batch_size_and_workload() -> None:
    arms = with_trees(full_arms(), ["tree-sampled-3x4-10", "tree-2x4"])
    named = [arm for arm in arms if arm.control == "tree-sampled-3x4-10"]
    assert [(arm.batch, arm.workload) for arm in named] == [
        *((batch, "equal") for batch in (1, 2, 4, 8, 16)),
        (8, "ragged"),
    ]
    assert {(arm.engine, arm.draft) for arm in named} == {("farm", "adapted")}
    assert len(arms) == len(set(arms)), "those of the full run are not doubled"
    with pytest.raises(ValueError, match="'tree-2' is no tree: tree-WxD-N"):
        with_trees(quick_arms(), ["tree-2"])


def test_arms_are_chosen_by_their_label() -> None:
    ragged = chosen(full_arms(), "/ragged/(transformers|farm/off)")
    assert [arm.label for arm in ragged] == ["8/ragged/transformers/off/none", "8/ragged/farm/off/none"]
    for pattern in ("sixteen", "("):
        with pytest.raises(ValueError, match="no arm|no regular"):
            chosen(full_arms(), pattern)
