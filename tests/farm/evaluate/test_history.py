"""What a store remembers: each adaptation once, costs of its own kind, and no stumbling over other files."""

from pathlib import Path
from typing import Any

import pytest

from farm.evaluate.history import read_history, typical_cost
from farm.evaluate.records import Report, TargetRow
from farm.evaluate.triage import TRAINING_SHARE, Tier
from farm.store import FileStore


def row(name: str, *, version: str = "v1", rows: int = 100, adapt: float = 50.0, **fields: Any) -> TargetRow:
    known: dict[str, Any] = {
        "kind": "full", "decision": "promoted", "tau_base_draft": 1.5, "tau_adapted": 3.0, "rows": rows,
        "stage_seconds": {"regenerate": 10.0, "adapt": adapt}, "adapter_version": version,
        "tokens_per_s_autoregressive": 200.0, "tokens_per_s_base_draft": 100.0,
    }  # fmt: skip
    return TargetRow(name=name, **(known | fields))


def put(store: FileStore, run: str, *rows: TargetRow, trunk: str = "a", tau: float | None = 4.0) -> None:
    report = Report(
        k=4, temperature=0, threads=1, dtype="float32", prompts=8, tau_base_on_base=tau, targets=rows,
        run_id=run, trunk_key=trunk,
    )  # fmt: skip
    store.put(f"runs/{run}/report.json", report.model_dump_json().encode())


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def test_an_adaptation_that_a_later_run_reuses_counts_once(store: FileStore) -> None:
    put(store, "1", row("math"), row("code"))
    put(store, "2", row("math"), row("math2", version="v2"))
    put(store, "3", row("math"), trunk="b")  # of another trunk: another adaptation
    history = read_history(store)
    assert [past.target for past in history] == ["math", "code", "math2", "math"]
    assert history[0].recovery == pytest.approx(1.5 / 2.5)
    assert history[0].plain_s == pytest.approx(1 / 200)
    assert history[0].round_s == pytest.approx(1.5 / 100)  # a round yields tau tokens


def test_an_adaptation_counts_for_the_tier_that_it_was_made_in(store: FileStore) -> None:
    """A low-rank one that is taken for an expert is never offered again, and spoils what is known of experts."""
    tiers = {"a": None, "b": "expert", "c": "low-rank", "d": "expert-lora", "e": "full"}
    put(store, "1", *(row(name, tier=tier) for name, tier in tiers.items()))
    assert [past.tier for past in read_history(store)] == ["expert", "expert", "low-rank", "expert", "full"]


def test_rows_without_a_measured_adaptation_and_foreign_files_say_nothing(store: FileStore) -> None:
    put(store, "1", row("a", tau_adapted=None), row("b", stage_seconds={}), row("c", tau_base_draft=None))
    put(store, "2", row("d"), tau=None)
    store.put("runs/3/report.json", b'{"k": 1}')
    store.put("runs/4/report.json", b"no json")
    store.put("runs/5/notes.txt", b"")
    assert read_history(store) == ()


def test_costs_are_those_of_the_same_kind_by_row(store: FileStore) -> None:
    put(
        store,
        "1",
        row("a"),
        row("b", adapt=70.0),
        row("c", adapt=1000.0, rows=50),
        row("d", kind="lora", rows=10),
    )
    history = read_history(store)
    cost = typical_cost(history, "full", 200)
    assert cost is not None
    assert (cost.answers_s, cost.training_s) == pytest.approx((20.0, 140.0))  # medians, not the outlier
    lora = typical_cost(history, "lora", 200)
    assert lora is not None
    assert lora.training_s == pytest.approx(1000.0)
    other = typical_cost(history[:2], "lora", 200)
    assert other is not None
    assert typical_cost((), "full", 200) is None


def test_answers_that_a_selection_dropped_were_paid_for_and_not_trained_on(store: FileStore) -> None:
    put(store, "1", row("a", rows=50, finish_reasons={"stop": 180, "length": 15, "error": 5}, selected=0.25))
    cost = typical_cost(read_history(store), "full", 400, 100)
    assert cost is not None
    assert (cost.answers_s, cost.training_s) == pytest.approx((20.0, 100.0))


@pytest.mark.parametrize("tier", ["low-rank", "expert", "full"])
def test_a_tier_that_was_measured_costs_what_it_took(store: FileStore, tier: Tier) -> None:
    """Taken for the expert's, its seconds would be multiplied by its share once more."""
    put(store, "1", row("a", tier=tier, adapt=51.0))
    cost = typical_cost(read_history(store), "full", 100)
    assert cost is not None
    assert cost.of(tier) == pytest.approx(10.0 + 51.0)
    assert cost.of("expert") == pytest.approx(10.0 + 51.0 / TRAINING_SHARE[tier])
