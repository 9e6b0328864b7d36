"""Judges the trials of `sparring tune`, as JSON and as one HTML file.

The best trial of SFT and the best of the other methods are chosen on one half of the held-out prompts, and compared on
the other half, once. SFT is returned unless the 95% interval of the difference says that the other one is better. So a
model that is truly worse than tuned SFT is returned in at most 2.5% of tunings.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe
from sparring.report import render_page
from sparring.report.bars import format_duration
from sparring.report.figures import COLORS, Figure, to_svg
from sparring.report.summary import NAMES
from sparring.run.estimate import Estimate
from sparring.run.manifest import Json, replace_file
from sparring.run.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*X"
RATE = "train.learning_rate="


@dataclass(frozen=True)
class Played:
    """One trial: its entry of `compare --methods`, iterations played, and its best value on the half that chooses."""

    label: str
    iterations: int
    value: float
    results: Results

    @property
    def method(self) -> str:
        return self.label.partition(":")[0]

    @property
    def rate(self) -> float:
        return next(float(part.removeprefix(RATE)) for part in self.label.split(":") if part.startswith(RATE))

    @property
    def iteration(self) -> int:
        """The best iteration on the half that chooses; -1 is the starting model."""
        return self.results.best_of(range(-1, self.iterations), self.results.halves[0])


class Tuning:
    """All trials of a tuning, and what they say."""

    def __init__(
        self, root: Path, recipe: Recipe, trials: Sequence[Played], rates: tuple[float, float], seconds: float
    ) -> None:
        self.root, self.recipe, self.rates, self.seconds = root, recipe, rates, seconds
        self.metric = recipe.evaluate.save_best_by
        self.sign = -1 if self.metric == "held_out_nll" else 1
        self.trials = sorted(trials, key=lambda trial: -self.sign * trial.value)
        self.sft = next(trial for trial in self.trials if trial.method == "sft")
        self.other = next((trial for trial in self.trials if trial.method != "sft"), None)

    @cached_property
    def judged(self) -> Estimate | None:
        """The best other method minus the best SFT, on the prompts that chose neither. None without another."""
        if self.other is None:
            return None
        other, sft = (one.results.per_row(self.metric, one.iteration) for one in (self.other, self.sft))
        return self.sft.results.estimate(self.metric, other - sft, self.sft.results.halves[1], is_change=True)

    @property
    def returned(self) -> Played:
        """The best other method if it is better than the best SFT, by its interval; else that SFT."""
        is_better = self.other is not None and self.judged is not None and self.judged.sign == self.sign
        return self.other if self.other is not None and is_better else self.sft

    def gain(self, *, choosing: bool) -> Estimate:
        """The change that the returned trial makes to the starting model, on the half that chooses or the other one."""
        trial = self.returned
        return trial.results.change(self.metric, -1, trial.iteration, trial.results.halves[0 if choosing else 1])

    @property
    def verdict(self) -> str:
        if self.other is None or self.judged is None:
            return f"No other method was tried in this budget. The best trial of SFT is {describe(self.sft)}."
        by = f"{NAMES[self.metric]} {with_interval(self.judged)} on {self.judged.clusters} prompts that chose neither"
        if self.returned is self.other:
            return f"{describe(self.other)} is better than tuned SFT, {describe(self.sft)}: {by}."
        return (
            f"No other method is better than tuned SFT, {describe(self.sft)}. "
            f"The best of them, {describe(self.other)}, differs by {by}."
        )

    @property
    def notes(self) -> list[str]:
        """What the choice cost, and what a larger budget might bring."""
        trial = self.returned
        if trial.iteration < 0:
            return ["No training improved on the starting model, by the prompts that choose."]
        own, other = (with_interval(self.gain(choosing=half)) for half in (True, False))
        name = NAMES[self.metric]
        found = [
            f"The choice: against the starting model, {name} changes by {own} on the prompts that chose and by {other} "
            "on the others. Only the second is free of the choice."
        ]
        if trial.iteration == self.recipe.iterations - 1:
            found.append("It was still improving in its last iteration: more iterations may bring more.")
        low, high = self.rates
        if not 1.5 * low < trial.rate < high / 1.5:
            found.append(f"Its learning rate, {trial.rate:g}, is at the end of the range from {low:.2g} to {high:.2g}.")
        if len(self.trials) < 4 * len({one.method for one in self.trials}):
            found.append(f"{len(self.trials)} trials are few: a larger budget continues where this one ended.")
        return found

    def as_json(self) -> Json:
        return {
            "verdict": self.verdict,
            "notes": self.notes,
            "metric": self.metric,
            "returned": self.returned.label,
            "seconds": self.seconds,
            "learning_rates": list(self.rates),
            "other_minus_sft": None
            if self.judged is None
            else {"mean": self.judged.mean, "low": self.judged.low, "high": self.judged.high},
            "prompts_that_judge": 0 if self.judged is None else self.judged.clusters,
            "trials": [
                {"label": one.label, "iterations": one.iterations, "chosen": one.iteration, "value": one.value}
                for one in self.trials
            ],
        }


def describe(trial: Played) -> str:
    return f"{trial.label} after iteration {trial.iteration}" if trial.iteration >= 0 else "the starting model"


def with_interval(found: Estimate) -> str:
    interval = "" if found.low is None or found.high is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{found.mean:+.4f}{interval}"


def write_tuning(tuning: Tuning) -> Path:
    """Writes tune.json and report.html."""
    numbers = tuning.as_json()
    replace_file(tuning.root / "tune.json", json.dumps(numbers, indent=1) + "\n")
    html = render_page(
        "tuning.html.j2",
        name=tuning.root.name,
        tuning=tuning,
        heading=NAMES[tuning.metric],
        figure=draw_rates(tuning),
        duration=format_duration(tuning.seconds),
        settings=dump_recipe(tuning.recipe),
        best=(tuning.root / "best.yaml").read_text(encoding="utf-8"),
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    path = tuning.root / "report.html"
    replace_file(path, html)
    return path


def draw_rates(tuning: Tuning) -> Figure:
    """Every trial: its best value on the half that chooses, by learning rate."""
    title = f"{NAMES[tuning.metric]} by learning rate"
    caption = "Best iteration of each trial, on the prompts that choose. Trials that ended early are included."
    return Figure(title, caption, to_svg(plot_rates(tuning), title, has_legend=True))


def plot_rates(tuning: Tuning) -> Callable[[Axes], None]:
    def plot(axes: Axes) -> None:
        methods = list(dict.fromkeys(one.method for one in tuning.trials))
        colors = list(COLORS.values())
        for number, method in enumerate(sorted(methods)):
            own = sorted((one for one in tuning.trials if one.method == method), key=lambda one: one.rate)
            axes.plot(
                [one.rate for one in own],
                [one.value for one in own],
                linestyle="",
                color=colors[number % len(colors)],
                marker=MARKERS[number % len(MARKERS)],
                label=method,
            )
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # the default writes powers in TeX, which is not drawn as such in SVG
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("learning rate")

    return plot
