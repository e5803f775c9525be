"""The report survives missing figures, hostile text and a kill in mid-write; the page loads nothing."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from farm.evaluate import report as report_module
from farm.evaluate.pictures import by_position, loss_curve
from farm.evaluate.report import Report, Sampled, TargetRow, read_report, terminal_table, write_report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;[red]{{ 7 * 7 }}"
ISSUE_FIELDS = (
    "name kind decision reason tau_base_draft tau_adapted survival_base_draft survival_adapted"
    " tokens_per_s_transformers tokens_per_s_autoregressive tokens_per_s_base_draft tokens_per_s_adapted"
    " speedup_adapted speedup_interval stage_seconds adapter_version"
).split()


def promoted(name: str = "math") -> TargetRow:
    return TargetRow(
        name=name,
        kind="full",
        decision="promoted",
        reason="the gain is above 0",
        tau_base_draft=1.5,
        tau_adapted=3.25,
        survival_base_draft=(0.3, 0.1, 0.06, 0.04),
        survival_adapted=(0.8, 0.6, 0.5, 0.35),
        tokens_per_s_transformers=90.0,
        tokens_per_s_autoregressive=100.0,
        tokens_per_s_base_draft=110.0,
        tokens_per_s_adapted=180.0,
        speedup_adapted=1.8,
        speedup_interval=(1.7, 1.9),
        stage_seconds={"probe": 2.0, "regenerate": 20.0, "adapt": 30.5},
        adapter_version="v1",
        temperature_1=Sampled(tau_base_draft=1.3, tau_adapted=2.5),
        alpha_base_draft=(0.3, 0.3, 0.6, 0.6),
        alpha_adapted=(0.8, 0.75, 0.8, 0.7),
        gain_interval=(1.5, 2.0),
        retention=0.4,
    )


def report_of(*rows: TargetRow, **changes: object) -> Report:
    values: dict[str, object] = {
        "k": 4,
        "temperature": 0.0,
        "threads": 2,
        "dtype": "float32",
        "prompts": 64,
        "tau_base_on_base": 3.75,
        "targets": rows,
        "run_id": "run-1",
        "curves": {"math": [(0, 2.0), (10, 1.5), (20, 1.2)]},
    }
    return Report.model_validate(values | changes)


class Page(HTMLParser):
    """Collects every tag with its attributes, and the text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def page_of(tmp_path: Path, report: Report) -> Page:
    return Page(write_report(tmp_path, report)[1].read_text(encoding="utf-8"))


def test_json_round_trips_and_holds_the_agreed_fields_first(tmp_path: Path) -> None:
    refused = TargetRow(name="b", kind="lora", decision="refused", reason="another tokenizer")
    report = report_of(promoted(), refused)
    path, _ = write_report(tmp_path, report)
    assert read_report(path) == report
    row = json.loads(path.read_text())["targets"][0]
    assert list(row)[: len(ISSUE_FIELDS)] == ISSUE_FIELDS


def test_figures_that_are_nan_or_infinite_become_null_and_the_report_is_still_strict_json(
    tmp_path: Path,
) -> None:
    row = TargetRow(
        name="a",
        kind="full",
        decision="kept",
        tau_base_draft=float("nan"),
        tau_adapted=2.0,
        survival_adapted=(0.5, float("nan")),
        speedup_interval=(float("-inf"), 1.0),
        stage_seconds={"adapt": float("nan")},
    )
    curves = {"a": [(0, 1.0), (1, float("nan")), (2, 0.5)]}
    path, _ = write_report(tmp_path, report_of(row, tau_base_on_base=float("nan"), curves=curves))
    raw = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert raw["tau_base_on_base"] is None
    assert raw["targets"][0]["survival_adapted"] == [0.5, None]
    assert read_report(path).targets[0].speedup_interval == (None, 1.0)


@pytest.mark.parametrize("decision", ["promoted", "kept", "skipped", "refused", "failed"])
def test_a_row_without_any_figure_is_shown_with_its_decision_and_reason(
    tmp_path: Path, decision: str
) -> None:
    row = TargetRow.model_validate({"name": "bare", "kind": "full", "decision": decision, "reason": "why so"})
    report = report_of(row, tau_base_on_base=None, curves={})
    page = page_of(tmp_path, report)
    assert "bare" in page.text
    assert "why so" in page.text
    assert ("span", {"class": f"badge {decision}"}) in page.tags
    console = Console(width=200, file=io.StringIO())
    console.print(terminal_table(report))
    assert "why so" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_run_without_targets_still_gives_a_page(tmp_path: Path) -> None:
    assert "no targets" in page_of(tmp_path, report_of(curves={})).text


def test_hostile_text_stays_text_in_page_pictures_and_terminal(tmp_path: Path) -> None:
    row = promoted(HOSTILE).model_copy(
        update={"reason": HOSTILE, "error": HOSTILE, "kind": HOSTILE, "stage_seconds": {HOSTILE: 1.0}}
    )
    everywhere = {"hardware": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}, "run_id": HOSTILE}
    report = report_of(row, base=HOSTILE, curves={HOSTILE: [(0, 1.0), (1, 2.0)]}, **everywhere)
    page = page_of(tmp_path, report)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "iframe", "object", "link"}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    assert HOSTILE in page.text
    console = Console(width=400, file=io.StringIO(), color_system=None)
    console.print(terminal_table(report))
    assert "[red]" in console.file.getvalue()  # type: ignore[attr-defined]


def test_the_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    _, path = write_report(tmp_path, report_of(promoted()))
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"https?://|//[a-z]|@import|url\(", source)
    loading = {"src", "href", "srcset", "data", "action", "xlink:href"}
    assert not [attributes for _, attributes in Page(source).tags if loading & set(attributes)]


def test_every_picture_of_a_measured_target_shows_its_figures(tmp_path: Path) -> None:
    page = page_of(tmp_path, report_of(promoted()))
    for shown in ("1.50", "3.25", "base on base 3.75", "k + 1 = 5", "1.80×", "52 s", "position 4: 0.350"):
        assert shown in page.text, shown
    assert sum(tag == "polyline" for tag, _ in page.tags) == 5  # two survivals, two alphas, one loss


def test_a_gap_in_a_curve_or_a_constant_curve_is_drawn(tmp_path: Path) -> None:
    assert "polyline" in by_position((0.5, None, 0.2), (None, None, None), 3, "x")
    assert "polyline" in loss_curve([(0, 0.0), (1, 0.0)], "x")
    assert "not measured" in loss_curve([(0, 1.0)], "x")


def test_a_long_curve_is_thinned_and_keeps_its_last_point(tmp_path: Path) -> None:
    picture = loss_curve([(step, 1.0 + step) for step in range(100_000)], "x")
    assert len(picture) < 20_000
    assert "step 99999" in picture


def test_a_kill_in_mid_write_leaves_the_earlier_report_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, report_of(promoted(), run_id="first"))

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report_module.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, report_of(promoted(), run_id="second"))
    assert read_report(tmp_path / "report.json").run_id == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_gain_is_measured_against_the_live_version_and_else_against_the_base_draft() -> None:
    assert promoted().gain == pytest.approx(1.75)
    assert promoted().model_copy(update={"tau_live": 3.0}).gain == pytest.approx(0.25)
    assert TargetRow(name="a", kind="full", decision="skipped", tau_base_draft=2.0).gain is None


def test_an_unknown_field_of_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="accept_length"):
        TargetRow.model_validate({"name": "a", "kind": "full", "decision": "kept", "accept_length": 3})
