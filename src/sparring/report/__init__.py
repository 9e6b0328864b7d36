"""A run directory -> one self-contained HTML file: no request, one script of ours, model text escaped."""

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
from sparring.report.alarms import alarms
from sparring.report.bars import QUADRANTS, quadrant_bars, time_bars
from sparring.report.figures import Z95, draw_held_out, draw_training
from sparring.report.headline import headline_index, readable, tiles
from sparring.report.samples import collect, shown
from sparring.report.story import story, worries
from sparring.run.manifest import replace_file
from sparring.run.results import Results
from sparring.run.rundir import RunDir

TABLE = (
    ("held_out_nll", "held-out NLL", "nats per token of the real answers; lower is better"),
    ("greedy_accuracy", "greedy accuracy", "share of right answers, decoded greedily"),
    ("sampled_accuracy", "sampled accuracy", "share of right answers, one sample each"),
    (
        "rewards/accuracies",
        "won",
        "share of rows whose real answer has the higher reward; at equilibrium as many as lost",
    ),
    ("rewards/ties", "tied", "share of rows on which both answers have the same reward"),
    ("rewards/margins", "reward margin", "reward of the real answer minus that of the opponent's"),
    ("advantages/current", "current advantage", "log p(real) - log p(opponent's answer), nats"),
    (
        "advantages/history_logps",
        "historical advantage",
        "log p(opponent's answer) - log p(first model's), nats",
    ),
    ("kl_from_opponent", "KL from opponent", "nats per answer"),
    ("kl_from_start", "KL from start", "nats per answer"),
    ("entropy", "entropy", "nats per token of its own samples"),
    ("length", "answer length", "tokens, mean"),
    ("length_ratio", "length / real", "mean length over that of the real answers"),
    ("end_rate", "ended", "share of answers with an end token"),
    ("distinct_2", "distinct-2", "different pairs of tokens over all pairs"),
    ("repetition", "repetition", "share of 4-grams that an answer repeats"),
    ("copy_rate", "copies", "share of answers equal to the real one"),
)
"""Metric, its heading, what it means."""

HEADLINE = (
    "held_out_nll",
    "greedy_accuracy",
    "sampled_accuracy",
    "rewards/accuracies",
    "length",
    "end_rate",
    "repetition",
)
"""The columns of the table by iteration; every metric stands in the table below it."""


def write_report(run: RunDir) -> Path:
    """Writes report.html from whatever is there, also in the middle of a run."""
    replace_file(run.report, render(run))
    return run.report


def render(run: RunDir) -> str:
    results = Results(run.root)
    evaluations, found = results.evaluations(), alarms(results)
    table = [row for row in TABLE if any(row[0] in metrics for metrics in evaluations.values())]
    return page(
        "report.html.j2",
        name=run.root.name,
        method=results.recipe.method,
        model="/".join(Path(results.recipe.model).parts[-3:]),
        results=results,
        data=results.data,
        best=results.best(),
        story=story(results),
        worries=worries(found) if len(evaluations) > 1 else "",
        alarms=found,
        tiles=tiles(results),
        headline_index=headline_index(results),
        z95=Z95,
        readable=readable,
        evaluations=evaluations,
        table=table,
        headline=[row for row in table if row[0] in HEADLINE],
        quadrants=QUADRANTS,
        benchmarks=results.benchmarks(),
        stages=results.stages(),
        missing=[s for s in results.stages() if s.state != "done"],
        held_out=draw_held_out(results),
        quadrant_bars=quadrant_bars(results),
        training=draw_training(results),
        times=time_bars(results),
        samples=collect(results),
        recipe=dump_recipe(results.recipe),
        env=run.env.read_text(encoding="utf-8") if run.env.is_file() else "",
        version=version("sparring"),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )


def page(template: str, **values: object) -> str:
    """A template with the style and the script that the pages share."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparring.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = shown
    style, script = (
        files("sparring.report").joinpath(f).read_text(encoding="utf-8") for f in ("style.css", "filter.js")
    )
    return environment.get_template(template).render(
        style=Markup(style),  # noqa: S704  (files of ours, and the script is the only one that the policy lets run)
        script=Markup(script),  # noqa: S704
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )
