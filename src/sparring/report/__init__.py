"""Renders a run directory as one self-contained HTML file. It sends no request, and all text in it is escaped."""

from __future__ import annotations

import base64
import hashlib
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import jinja2
from markupsafe import Markup

from sparring.recipe.load import dump_recipe
from sparring.report.bars import QUADRANTS, quadrant_bars, time_bars
from sparring.report.figures import draw_held_out, draw_training
from sparring.report.samples import collect, display_text
from sparring.report.summary import (
    METRICS,
    PERCENTAGES,
    format_metric,
    format_value,
    headline_cards,
    scoring_noise,
    summary,
    warning_summary,
)
from sparring.report.warnings import find_warnings
from sparring.run.manifest import replace_file
from sparring.run.results import Results, name_methods
from sparring.run.rundir import RunDir

MAIN_METRICS = {"held_out_nll", *PERCENTAGES, "length"}
"""The columns of the table by iteration. The table below it has every metric."""


def write_report(run: RunDir) -> Path:
    """Writes report.html from what the run contains so far."""
    replace_file(run.report, render(run))
    return run.report


def render(run: RunDir) -> str:
    results = Results(run.root)
    evaluations, warnings = results.evaluations(), find_warnings(results)
    metrics = [row for row in METRICS if any(row[0] in values for values in evaluations.values())]
    return render_page(
        "report.html.j2",
        name=run.root.name,
        methods=name_methods(results.recipe),
        model="/".join(Path(results.recipe.model).parts[-3:]),
        results=results,
        data=results.data,
        best=results.best(),
        summary=summary(results),
        warning_summary=warning_summary(warnings) if len(evaluations) > 1 else "",
        warnings=warnings,
        cards=headline_cards(results),
        headline=results.headline(),
        format_metric=format_metric,
        format_value=format_value,
        evaluations=evaluations,
        metrics=metrics,
        main_metrics=[row for row in metrics if row[0] in MAIN_METRICS],
        quadrants=QUADRANTS,
        benchmarks=results.benchmarks(),
        stages=results.stages(),
        missing=[stage for stage in results.stages() if stage.state != "done"],
        held_out=draw_held_out(results),
        quadrant_bars=quadrant_bars(results),
        training=draw_training(results),
        scoring_noise=scoring_noise(results),
        times=time_bars(results),
        samples=collect(results),
        recipe=dump_recipe(results.recipe),
        env=run.env.read_text(encoding="utf-8") if run.env.is_file() else "",
        version=version("sparring"),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def render_page(template: str, **values: object) -> str:
    """Renders a template with the style and the script that all pages share."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparring.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["display"] = display_text
    style, script = (
        files("sparring.report").joinpath(f).read_text(encoding="utf-8") for f in ("style.css", "filter.js")
    )
    return environment.get_template(template).render(
        style=Markup(style),  # noqa: S704  (our own files; the policy lets only this script run)
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )
