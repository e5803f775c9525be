"""The pictures of the report page, as inline SVG, one a function; what was not measured is left blank."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from farm.evaluate.records import Figure, Interval, Report, TargetRow, figure
from farm.evaluate.svg import Canvas, Point, Scale

WIDTH, LABELS = 940.0, 178.0  # of the full-width pictures, and of their column of names
SMALL = (264.0, 158.0)
NAME_LIMIT = 20  # characters of a target's name
CURVE_POINTS = 240  # a longer curve is thinned to about this


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval, for one target."""

    name: str
    value: Figure
    interval: Interval | None


def tau_bars(report: Report) -> Markup:
    """Tau of the base draft and of the adapted one, two bars a target, against base-on-base and k + 1."""
    top, pitch, thick = 34.0, 46.0, 14.0
    ceiling = report.k + 1.0
    bottom = top + pitch * len(report.targets)
    canvas = Canvas(WIDTH, bottom + 30, "tau of each target before and after adapting")
    x = Scale(0, ceiling, LABELS, WIDTH - 76)
    for tick in range(report.k + 2):
        canvas.line((x(tick), top - 6), (x(tick), bottom), "grid")
        canvas.text((x(tick), bottom + 18), str(tick), "tick", "middle")
    for index, row in enumerate(report.targets):
        y = top + pitch * index
        _row_name(canvas, row, y + 20)
        bars = [("base draft", row.tau_base_draft, "before"), ("adapted", row.tau_adapted, "after")]
        for offset, (label, value, style) in enumerate(bars):
            if value is None:
                continue
            corner = (x(0), y + 6 + offset * (thick + 2))
            canvas.rect(
                corner, (x(value) - x(0), thick), style, f"{row.name}: tau {figure(value, 3)}, {label}"
            )
            canvas.text((x(value) + 6, corner[1] + 11), figure(value), "value halo")
        if row.tau_base_draft is None and row.tau_adapted is None:
            canvas.text((x(0) + 8, y + 26), f"{row.decision}: no figures", "note")
    canvas.line((x(ceiling), top - 10), (x(ceiling), bottom), "ceiling")
    canvas.text((x(ceiling) + 6, top - 12), f"k + 1 = {report.k + 1}", "tick")
    if report.tau_base_on_base is not None:
        at = x(report.tau_base_on_base)
        canvas.line((at, top - 10), (at, bottom), "reference")
        canvas.text((at - 6, top - 12), f"base on base {figure(report.tau_base_on_base)}", "tick", "end")
    return canvas.markup()


def interval_dots(estimates: Sequence[Estimate], reference: float, unit: str, label: str) -> Markup:
    """A dot with its interval a target, and a line at `reference`; the axis covers all of them."""
    ends = [end for dot in estimates for end in (dot.value, *(dot.interval or ())) if end is not None]
    low, high = min([reference, *ends]), max([reference, *ends])
    margin = 0.06 * ((high - low) or 1.0)
    top, pitch, width, names = 12.0, 26.0, 452.0, 150.0
    bottom = top + pitch * len(estimates)
    canvas = Canvas(width, bottom + 26, label)
    x = Scale(low - margin, high + margin, names, width - 64)
    for tick in x.ticks(4):
        canvas.line((x(tick), top), (x(tick), bottom), "grid")
        canvas.text((x(tick), bottom + 17), f"{tick:g}{unit}", "tick", "middle")
    canvas.line((x(reference), top), (x(reference), bottom), "reference")
    for index, dot in enumerate(estimates):
        y = top + pitch * (index + 0.5)
        canvas.text((names - 12, y + 4), dot.name, "name", "end", limit=16)
        canvas.text((width, y + 4), figure(dot.value, suffix=unit), "value", "end")
        if dot.interval is not None and dot.interval[0] is not None and dot.interval[1] is not None:
            canvas.line((x(dot.interval[0]), y), (x(dot.interval[1]), y), "whisker")
        if dot.value is not None:
            canvas.dot((x(dot.value), y), "after", f"{dot.name}: {figure(dot.value, 3, unit)}")
    return canvas.markup()


def by_position(before: Sequence[Figure], after: Sequence[Figure], k: int, label: str) -> Markup:
    """Two lines over draft positions 1..k on a 0..1 axis: the base draft's and the adapted draft's."""
    canvas, left, bottom = Canvas(*SMALL, label), 34.0, SMALL[1] - 24
    x = Scale(1, max(k, 2), left + 12, SMALL[0] - 14)
    y = Scale(0, 1, bottom, 10)
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        canvas.line((left, y(tick)), (SMALL[0] - 4, y(tick)), "grid")
        if tick in (0.0, 0.5, 1.0):
            canvas.text((left - 6, y(tick) + 4), f"{tick:g}", "tick", "end")
    for position in range(1, k + 1):
        canvas.text((x(position), bottom + 16), str(position), "tick", "middle")
    for values, style in ((before, "before"), (after, "after")):
        points = [(x(i), y(value)) for i, value in enumerate(values[:k], start=1) if value is not None]
        canvas.polyline(points, f"stroke {style}-line")
        for i, value in enumerate(values[:k], start=1):
            if value is not None:
                canvas.dot((x(i), y(value)), style, f"position {i}: {figure(value, 3)}")
    if not before and not after:
        _blank(canvas, bottom)
    return canvas.markup()


def loss_curve(points: Sequence[tuple[int, Figure]], label: str) -> Markup:
    """Training loss over steps, the axis from 0 to the largest loss."""
    known = [(step, loss) for step, loss in points if loss is not None]
    known = known[: -1 : max(1, len(known) // CURVE_POINTS)] + known[-1:]
    canvas, left, bottom = Canvas(*SMALL, label), 40.0, SMALL[1] - 24
    if len(known) < 2:
        _blank(canvas, bottom)
        return canvas.markup()
    x = Scale(known[0][0], known[-1][0], left + 4, SMALL[0] - 18)
    y = Scale(0, max(loss for _, loss in known), bottom, 10)
    for tick in y.ticks(4):
        canvas.line((left, y(tick)), (SMALL[0] - 4, y(tick)), "grid")
        canvas.text((left - 6, y(tick) + 4), f"{tick:g}", "tick", "end")
    for tick in x.ticks(3):
        canvas.text((x(tick), bottom + 16), f"{tick:g}", "tick", "middle")
    line: list[Point] = [(x(step), y(loss)) for step, loss in known]
    canvas.polyline(line, "stroke after-line")
    canvas.dot(line[-1], "after", f"step {known[-1][0]}: loss {figure(known[-1][1], 4)}")
    canvas.text((line[-1][0], line[-1][1] - 12), figure(known[-1][1], 3), "value halo", "end")
    return canvas.markup()


def stages_of(report: Report) -> list[str]:
    """The names of all timed stages in the order in which they first appear, shared stages first."""
    timings = [report.stage_seconds, *(row.stage_seconds for row in report.targets)]
    return list(dict.fromkeys(stage for timing in timings for stage in timing))


def stage_bars(report: Report) -> Markup:
    """Seconds by stage, one stacked bar a target; stages that all targets share have a bar of their own."""
    bars = [("all targets", report.stage_seconds)] if report.stage_seconds else []
    bars += [(row.name, row.stage_seconds) for row in report.targets]
    totals = [sum(seconds or 0.0 for seconds in timing.values()) for _, timing in bars]
    top, pitch, thick = 8.0, 28.0, 16.0
    bottom = top + pitch * len(bars)
    canvas = Canvas(WIDTH, bottom + 28, "seconds of each stage for each target")
    x = Scale(0, max([*totals, 0.0]), LABELS, WIDTH - 76)
    for tick in x.ticks(6):
        canvas.line((x(tick), top), (x(tick), bottom), "grid")
        canvas.text((x(tick), bottom + 18), f"{tick:g} s", "tick", "middle")
    stages = stages_of(report)
    for index, ((bar, timing), total) in enumerate(zip(bars, totals, strict=True)):
        y = top + pitch * index + (pitch - thick) / 2
        canvas.text((LABELS - 14, y + 12), bar, "name", "end", limit=NAME_LIMIT)
        done = 0.0
        for stage in (name for name in stages if name in timing):
            seconds = timing[stage]
            width = x(done + (seconds or 0.0)) - x(done)
            hint = f"{bar}: {stage} {figure(seconds, 1, ' s')}"
            canvas.rect((x(done), y), (width, thick), f"stage-{stages.index(stage) % 8}", hint)
            done += seconds or 0.0
        canvas.text((x(total) + 6, y + 12), figure(total if timing else None, 0, " s"), "value")
    return canvas.markup()


def _row_name(canvas: Canvas, row: TargetRow, y: float) -> None:
    canvas.text((LABELS - 14, y), row.name, "name", "end", limit=NAME_LIMIT)
    canvas.text((LABELS - 14, y + 15), row.kind, "tick", "end")


def _blank(canvas: Canvas, bottom: float) -> None:
    canvas.text((SMALL[0] / 2, bottom / 2 + 8), "not measured", "note", "middle")
