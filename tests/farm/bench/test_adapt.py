"""The benchmark of adaptation on a tiny onboarded family: rows say what was trained, and it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from farm.artifacts import TRUNK, Artifacts
from farm.bench import adapt_plots
from farm.bench.adapt import Row, _Run, identities, measure
from farm.bench.adapt_data import Subject, choose_rows, data_keys, subjects
from farm.bench.adapt_markdown import page
from farm.bench.adapt_report import code_digest, compare, keep, kept, table, tau_after, write
from farm.bench.methods import SELECTIONS, Variant, Work, methods_of, variants, work
from farm.bench.report import origin
from farm.config import Manifest
from farm.data.features import write_shard
from farm.data.prompts import load_prompts
from farm.data.rejects import trainable
from farm.decode.regenerate import regenerate_rows
from farm.registry import Registry
from farm.sections import AdaptSettings, RegenerateSettings, Strategy
from farm.store import open_store
from farm.target.load import open_target
from farm.train.loop import FitResult
from tests.farm.fleet.family import Family

DEFAULT = AdaptSettings(epochs=1, batch_rows=4, lr=1e-3, form="cached", cached_tokens=32)


def onboarded(root: Path) -> Manifest:
    """A family with one target's answers and a live adapter that names them, as an onboarding leaves it."""
    family = Family(root)
    manifest = family.manifest("legal", store=root / "store")
    prompts = Path(manifest.targets[0].prompts)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    prompts.write_text(
        "".join(json.dumps(row | {"answer": "one two three four five"}) + "\n" for row in rows)
    )
    store = open_store(manifest.store)
    artifacts, registry = Artifacts(store), Registry(store)
    for file in family.trunk.iterdir():
        artifacts.put_file(TRUNK, "trunk", file.name, file.read_bytes())
    artifacts.finish(TRUNK, "trunk", {})
    target = open_target(manifest.targets[0], "float32")
    settings = RegenerateSettings(max_new_tokens=12)
    answers = regenerate_rows(target, load_prompts(str(prompts), (0, 16)).prompts, settings)
    write_shard(artifacts, "answers", "answers", 0, answers)
    artifacts.finish("answers", "answers", {"rows": 16})
    registry.put_family({"trunk_key": "trunk"})
    expert = (family.trunk / "expert.safetensors").read_bytes()
    card = {"trunk_key": "trunk", "answers_key": "answers"}
    version = registry.publish("legal", {"expert.safetensors": expert}, card)
    registry.promote("legal", version.version, None)
    return manifest


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    yield from subjects(onboarded(tmp_path_factory.mktemp("family")), ["legal"])


def chosen(*labels: str) -> list[Work]:
    return [Work(one, 0) for one in variants(DEFAULT) if one.label in labels]


def run(subject: Subject, todo: list[Work], done: list[Row]) -> list[Row]:
    found = measure(subject, "tiny", DEFAULT, todo, identities(done))
    return [row for rows in found for row in rows]


def test_rows_say_what_was_trained_and_a_second_run_measures_only_what_is_missing(
    subject: Subject, tmp_path: Path
) -> None:
    todo = chosen("base draft", "default", "eda, dataset answers", "low-rank expert, 8")
    rows = run(subject, todo, [])
    base, default, original, lora = rows
    assert (base.method, base.train_seconds, base.adapter_bytes) == ("base-draft", 0.0, 0)
    assert (default.form, default.data, default.tier) == ("cached", "regenerated", "expert")
    assert (original.data, original.loss, original.tier, original.init) == ("dataset", "eda", "eda", "random")
    assert 0 < lora.adapter_bytes < default.adapter_bytes < original.adapter_bytes
    assert all(1.0 <= row.tau <= 3.0 and 0.0 <= row.alpha <= 1.0 for row in rows)
    assert all(row.train_seconds > 0 and row.train_flops > 0 for row in rows[1:])
    samples = subject.samples("regenerated")
    lengths = [len(s.tokens_T) - s.num_prompt_tokens for s in samples]
    positions = sum(length - 1 for length in lengths if trainable(length))
    assert default.train_tokens == positions // 32 * 32
    source = origin("farm bench adapt") | {"code": code_digest()}
    keep(tmp_path, rows[:2], source)
    before = kept(tmp_path, "tiny", source)
    assert before == rows[:2]
    again = run(subject, todo, before)
    assert [row.variant for row in again] == ["eda, dataset answers", "low-rank expert, 8"]
    assert again[0].tau == original.tau
    assert kept(tmp_path, "tiny", source | {"code": "another"}) == []
    assert kept(tmp_path, "tiny", source | {"adapt": {"epochs": 2}}) == []
    assert kept(tmp_path, "another", source) == []


def test_rows_of_other_answers_another_trunk_or_another_dtype_are_measured_again(
    tmp_path: Path, subject: Subject
) -> None:
    source = {"code": "c"} | data_keys(subject.manifest)
    assert (source["dtype"], source["trunk"], source["answers"]) == ("auto", "trunk", {"legal": "answers"})
    rows = [replace(ROW, model="tiny", target=name) for name in ("legal", "code")]
    source["answers"] = {"legal": "answers", "code": "others"}
    keep(tmp_path, rows, source)
    assert kept(tmp_path, "tiny", source) == rows
    assert kept(tmp_path, "tiny", source | {"answers": {"legal": "answers", "code": "new"}}) == rows[:1]
    for name in ("dtype", "trunk"):
        assert kept(tmp_path, "tiny", source | {name: "another"}) == []


def test_full_retraining_is_measured_on_its_way_and_its_best_rate_is_chosen_by_held_out_rows(
    subject: Subject, tmp_path: Path
) -> None:
    rows = run(subject, chosen("base draft", "default", "full retraining"), [])
    curve = [row for row in rows if row.method == "full-retrain"]
    assert [row.train_seconds for row in curve] == sorted(row.train_seconds for row in curve)
    assert curve[-1].progress == 1.0
    assert len(curve) > 2
    assert {row.lr for row in curve} < {5e-4, 1e-3, 2e-3}
    assert table(rows).row_count == 3
    paths = write(tmp_path, rows, origin("farm bench adapt"))
    assert [path.name for path in paths] == ["adapt.json", "adapt-seconds.png", "adapt-survival.png"]
    assert all(imread(path).std() > 0 for path in paths[1:])
    record = json.loads(paths[0].read_text())
    assert len(record["comparison"]) == 1
    assert record["comparison"][0]["of_bytes"] < 1


def test_a_run_counts_by_its_best_measurement_whose_weights_it_leaves() -> None:
    measured = ((20, 1.5), (40, 1.9), (60, 1.7))
    assert _Run(DEFAULT, FitResult(60, (), "", "", measured), ()).held_out == 1.9
    assert _Run(DEFAULT, FitResult(60, (), "", ""), ()).held_out == 0.0


@pytest.mark.parametrize("strategy", SELECTIONS)
def test_a_selection_trains_on_its_share(subject: Subject, strategy: Strategy) -> None:
    part, all_rows = run(
        subject,
        [
            Work(Variant("selection", "half", selection=strategy, fraction=0.5), 3),
            Work(Variant("default", "default"), 3),
        ],
        [],
    )
    assert part.train_tokens < all_rows.train_tokens


def test_selections_differ_in_what_they_choose(subject: Subject) -> None:
    found = {name: choose_rows(subject, name, 0.5, 0).rows for name in SELECTIONS}
    assert len(set(found.values())) > 2
    assert {len(rows) for rows in found.values()} == {8}


def test_only_the_main_methods_are_measured_on_later_targets() -> None:
    every = variants(DEFAULT)
    later = work(every, (), 3, first=False)
    assert {item.variant.method for item in later} == {"base-draft", "default", "eda", "full-retrain"}
    assert {item.seed for item in later} == {0, 1, 2}
    assert methods_of([item.variant for item in work(every, (), 1, first=True)]) == methods_of(every)


ROW = Row(
    "m",
    "t",
    "default",
    "default",
    "regenerated",
    "all",
    1.0,
    "kl",
    "cached",
    "expert",
    0,
    4.0,
    0.9,
    10.0,
    1,
    1.0,
    50,
)


def full(tau: float, seconds: float, progress: float = 0.5) -> Row:
    return replace(
        ROW, method="full-retrain", tau=tau, train_seconds=seconds, progress=progress, adapter_bytes=200
    )


def test_the_default_is_compared_with_the_plateau_and_with_equal_seconds() -> None:
    curve = [full(2.0, 5.0), full(3.0, 15.0), full(3.98, 40.0), full(4.0, 100.0, 1.0)]
    eda = replace(ROW, method="eda", tau=3.2)
    (found,) = compare([ROW, eda, *curve])
    assert found.of_converged_tau == 1.0
    assert found.of_convergence_seconds == 10.0 / 40.0  # first within 1 % of 4.0
    assert found.of_tau_at_equal_seconds == 4.0 / 2.5  # half way between 5 and 15 seconds
    assert (found.of_eda, found.of_bytes) == (1.25, 0.25)
    assert tau_after(curve, 1.0) == 2.0
    assert tau_after(curve, 1000.0) == 4.0
    (alone,) = compare([ROW])
    assert (alone.of_eda, alone.of_converged_tau) == (None, None)


def test_the_page_answers_what_the_filter_and_the_forms_bring() -> None:
    def way(method: str, variant: str, tau: float, seconds: float = 10.0, **more: Any) -> Row:
        return replace(ROW, method=method, variant=variant, tau=tau, train_seconds=seconds, **more)

    rows = [
        ROW, way("losses", "kl", 3.0), way("adaspec", "kl + adaspec", 2.9), way("losses", "lk", 3.2),
        way("adaspec", "lk + adaspec", 3.1), way("adaspec", "lk + adaspec", 3.3, seed=1),
        way("forms", "expert, cached", 2.0, 2.0, progress=0.25), way("forms", "expert, cached", 4.0, 8.0),
        way("forms", "expert, unrolled", 3.5, 4.0),
    ]  # fmt: skip
    shown = page(rows, "farm bench adapt", "abc").splitlines()
    assert "| t | kl | 3.00 | 2.90 |" in shown
    assert "| t | lk | 3.20 | 3.20 (3.10 to 3.30) |" in shown
    assert "| t | expert, cached | 2.67 | 4.0 |" in shown, "a third of the way from 2 to 8 seconds"
    assert "| t | expert, unrolled | 3.50 | 4.0 |" in shown
    assert (
        "| t | adaspec | lk + adaspec | regenerated, all 100% | kl | cached | 3.20 (3.10 to 3.30) | 10.0 | 0 |"
        in shown
    )
    assert "Losses" not in page([ROW], "farm bench adapt", "abc")


def test_a_colour_means_the_same_in_every_panel_and_the_legend_names_each(subject: Subject) -> None:
    """A method that only one target was measured with must not shift the colours of the others."""
    rows = run(subject, chosen("base draft", "default", "low-rank expert, 8"), [])
    other = [replace(row, target="other") for row in rows if row.method != "default"]
    figure = adapt_plots.survival([*rows, *other])
    first, second = figure.axes
    colours = {line.get_label(): line.get_color() for line in first.get_lines()}
    assert len(set(colours.values())) == 3
    assert all(line.get_color() == colours[line.get_label()] for line in second.get_lines())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(colours)
