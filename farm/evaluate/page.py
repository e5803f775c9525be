"""`report.html`: one file with its style and pictures inside, which loads nothing from anywhere."""

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from farm.evaluate import pictures
from farm.evaluate.records import Report, figure


def render_page(report: Report) -> str:
    """The whole page. Every name, reason and traceback is escaped, as HTML or as XML of a picture."""
    rows = report.targets
    gains = [pictures.Estimate(row.name, row.gain, row.gain_interval) for row in rows]
    speeds = [pictures.Estimate(row.name, row.speedup_adapted, row.speedup_interval) for row in rows]
    return _template().render(
        report=report,
        figure=figure,
        timed=[row for row in rows if row.tokens_per_s_autoregressive is not None],
        tau_picture=pictures.tau_bars(report),
        gain_picture=pictures.interval_dots(gains, 0.0, "", "gain in tau of each target"),
        speed_picture=pictures.interval_dots(speeds, 1.0, "×", "speed-up of each target"),
        stage_picture=pictures.stage_bars(report),
        stages=pictures.stages_of(report),
        by_position=pictures.by_position,
        loss_curve=pictures.loss_curve,
    )


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("farm.evaluate", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
