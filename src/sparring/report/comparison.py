"""Turns the runs of one comparison into numbers with uncertainty, as JSON and as one HTML file.

It separates two kinds of uncertainty: between seeds, and between held-out prompts (of the difference to the control,
averaged over seeds). The iteration that represents an arm is chosen on one half of the held-out prompts and evaluated
on the other, for every method alike. For SFT that is early stopping.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparring.errors import UserError
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe
from sparring.report import render_page
from sparring.report.bars import QUADRANTS
from sparring.report.figures import COLORS, Figure, error_bars, iteration_ticks, to_svg
from sparring.report.samples import Sample, collect
from sparring.report.summary import NAMES
from sparring.run.estimate import estimate
from sparring.run.manifest import Json, read_manifest, read_sealed, replace_file
from sparring.run.results import MEASURED, Results, data_frame, name_methods
from sparring.run.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

STYLES = [(color, style) for style in ("-", "--", ":", "-.") for color in COLORS.values()]
"""Color and line style of the arms, in their order."""


@dataclass(frozen=True)
class Arm:
    """One method with one seed on one fraction of the training rows: a run directory."""

    label: str
    seed: int
    share: float
    run: RunDir

    @cached_property
    def results(self) -> Results:
        return Results(self.run.root)

    @cached_property
    def last(self) -> int:
        return self.results.recipe.iterations - 1

    def budget(self) -> dict[str, float]:
        """What the arm used: annotated rows, trained tokens, and seconds of all stages, shared ones included."""
        lines = [line for index in range(self.last + 1) for line in self.results.training(index)]
        stages = [stage for stage in self.results.stages() if stage.iteration >= 0 and stage.stage != "evaluate"]
        return {
            "annotations": self.results.data.num_train if self.results.data else 0,
            "optimizer_tokens": sum(line["num_tokens"] for line in lines),
            "seconds": sum(stage.seconds or 0.0 for stage in stages),
        }


class Comparison:
    """All arms of a comparison. Raises `UserError` unless they were evaluated in the same way."""

    def __init__(self, root: Path, recipe: Recipe, arms: Sequence[Arm]) -> None:
        self.root, self.recipe, self.arms = root, recipe, arms
        check_comparable(arms)
        self.labels = list(dict.fromkeys(arm.label for arm in arms))
        self.shares = sorted({arm.share for arm in arms})
        self.control = "sft" if "sft" in self.labels else self.labels[0]
        self.metrics = list(MEASURED if recipe.evaluate.checker is not None else MEASURED[:1])
        self.choosing, self.judging = arms[0].results.halves

    def select(self, label: str, share: float) -> list[Arm]:
        return [arm for arm in self.arms if (arm.label, arm.share) == (label, share)]

    def choose_iteration(self, arm: Arm) -> int:
        """The best iteration by the recipe's save_best_by on one half of the held-out prompts; -1 is the start."""
        return arm.results.best_of(range(-1, arm.last + 1), self.choosing)

    def curve(self, label: str, share: float, metric: str) -> list[Json]:
        arms = self.select(label, share)
        return [
            {"iteration": t, **over_seeds([a.results.value(metric, t, a.results.all_rows).mean for a in arms])}
            for t in range(-1, arms[0].last + 1)
        ]

    def at_chosen(self, label: str, share: float, metric: str) -> Json:
        """The metric at each arm's chosen iteration, on the prompts that did not choose it."""
        iterations = {arm: self.choose_iteration(arm) for arm in self.select(label, share)}
        values = [arm.results.value(metric, index, self.judging).mean for arm, index in iterations.items()]
        return {**over_seeds(values), "iterations": list(iterations.values())}

    def difference(self, label: str, share: float, metric: str, *, control_share: float, at: str) -> Json:
        """The difference to the control, paired by seed and row. `at`: the "last" or the "chosen" iteration."""
        rows = self.arms[0].results.all_rows if at == "last" else self.judging
        per_seed, results = [], self.arms[0].results  # whose prompts and lengths are those of all arms
        for pair in zip(self.select(label, share), self.select(self.control, control_share), strict=True):
            indices = [arm.last if at == "last" else self.choose_iteration(arm) for arm in pair]
            treated, control = (arm.results.per_row(metric, t) for arm, t in zip(pair, indices, strict=True))
            per_seed.append(treated - control)
        means = [results.estimate(metric, values, rows, is_change=True).mean for values in per_seed]
        over_rows = results.estimate(metric, np.mean(per_seed, axis=0), rows, is_change=True)
        return {**over_seeds(means), "rows_95": None if over_rows.low is None else [over_rows.low, over_rows.high]}

    def to_pandas(self) -> DataFrame:
        """The held-out metrics of each method, seed and iteration (-1: the start). `is_chosen`: the best iteration."""
        return data_frame(
            [
                {"method": arm.label, "seed": arm.seed, "share": arm.share, "iteration": index}
                | {"is_chosen": index == chosen, **metrics}
                for arm, chosen in [(arm, self.choose_iteration(arm)) for arm in self.arms]
                for index, metrics in arm.results.evaluations().items()
            ]
        )

    def plot(self, metric: str = "held_out_nll", axes: Axes | None = None) -> Axes:
        """Draws a metric of every method by iteration: the mean over seeds with 95% intervals, on all held-out rows."""
        from matplotlib import pyplot

        if metric not in self.metrics:
            raise UserError(f"plot: {metric} is not compared. Choose one of {', '.join(self.metrics)}.")
        axes = axes or pyplot.subplots()[1]
        curves = [(label, self.curve(label, self.shares[-1], metric)) for label in self.labels]
        plot_arms([(label, range(-1, len(curve) - 1), curve) for label, curve in curves], "iteration")(axes)
        axes.set_ylabel(metric)
        axes.legend()
        return axes

    def arm_json(self, label: str, share: float) -> Json:
        arms = self.select(label, share)
        budgets = [arm.budget() for arm in arms]
        ends = [arm.results.evaluation(arm.last) or {} for arm in arms]

        def differences(control_share: float, at: str) -> Json:
            return {m: self.difference(label, share, m, control_share=control_share, at=at) for m in self.metrics}

        return {
            "method": label,
            "share": share,
            "budget": {key: mean([budget[key] for budget in budgets]) for key in budgets[0]},
            "curves": {metric: self.curve(label, share, metric) for metric in self.metrics},
            "chosen": {metric: self.at_chosen(label, share, metric) for metric in self.metrics},
            "to_control": {at: differences(share, at) for at in ("last", "chosen")},
            "to_control_on_all_rows": differences(self.shares[-1], "chosen"),
            "quadrants": {
                key: mean([end[key] for end in ends]) for key, _ in QUADRANTS if all(key in end for end in ends)
            },
        }

    def as_json(self) -> Json:
        env = json.loads(read_sealed(self.arms[0].run.env))["sessions"][0]
        return {
            "control": self.control,
            "seeds": len({arm.seed for arm in self.arms}),
            "held_out_rows": len(self.judging),
            "held_out_prompts": len(set(self.arms[0].results.held_out[0])),
            "chosen_by": self.recipe.evaluate.save_best_by,
            "machine": {key: env[key] for key in ("machine", "device", "threads", "versions", "commit")},
            "arms": [self.arm_json(label, share) for share in reversed(self.shares) for label in self.labels],
            "recipe": self.recipe.model_dump(by_alias=True, mode="json"),
        }


def compare(*runs: str | Path | Results) -> Comparison:
    """Compares finished runs that have the same held-out rows and starting model. Plays and writes nothing.

    Runs of one method with several seeds are averaged. Two runs of one method and seed are told apart by their folders.
    Raises `UserError` unless the runs can be compared.
    """
    every = [run if isinstance(run, Results) else Results(run) for run in runs]
    if len(every) < 2:
        raise UserError("compare: pass two or more run directories.")
    for results in every:
        wanted, found = results.recipe.iterations + 1, len(results.evaluations())
        if found < wanted:
            raise UserError(
                f"{results.run.root} has {found} of {wanted} evaluations, the start's included. Finish it first; a run "
                "that stopped early or has no held-out rows cannot be compared."
            )
    seeds = [results.recipe.seed for results in every]
    names = [[name_methods(r.recipe), r.run.root.name, str(r.run.root)] for r in every]
    labels = next(found for found in zip(*names, strict=True) if len({*zip(found, seeds, strict=True)}) == len(every))
    by_label = {label: {s for name, s in zip(labels, seeds, strict=True) if name == label} for label in labels}
    for label, of_label in by_label.items():
        if of_label != by_label[labels[0]]:
            raise UserError(
                f"compare: the seeds of {label} are {sorted(of_label)}, those of {labels[0]} "
                f"{sorted(by_label[labels[0]])}. Play every method with the same seeds."
            )
    arms = [Arm(label, seed, 1.0, results.run) for label, seed, results in zip(labels, seeds, every, strict=True)]
    return Comparison(every[0].run.root.parent, every[0].recipe, sorted(arms, key=lambda arm: arm.seed))


def check_comparable(arms: Sequence[Arm]) -> None:
    """Raises `UserError` unless all arms were evaluated on the same rows in the same way."""
    first: dict[str, object] = {}
    for arm in arms:
        recipe, data = arm.results.recipe, arm.results.data
        conditions: dict[str, object] = {
            "the set of held-out rows": read_manifest(arm.run.data).files["held_out.parquet"]["xxh3"],
            "the starting model": data.model if data else None,
            "the template": data.template_digest if data else None,
            "evaluate.checker": recipe.evaluate.checker,
            "generate": recipe.generate,
            "train.dtype": recipe.train.dtype,
            "iterations": recipe.iterations,
        }
        for name, value in conditions.items():
            if first.setdefault(name, value) != value:
                raise UserError(
                    f"{arm.run.root} cannot be compared with {arms[0].run.root}: {name} differs. Move it away, or "
                    "play it again with the same settings."
                )


def over_seeds(values: Sequence[float]) -> Json:
    """Mean, and half of the 95% interval between seeds; None for one seed."""
    found = estimate(np.array(values))
    half = None if found.high is None else found.high - found.mean
    return {"mean": found.mean, "half_width_95": half, "seeds": list(values)}


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def write_comparison(comparison: Comparison) -> Path:
    """Writes comparison.json and report.html."""
    numbers = comparison.as_json()
    replace_file(comparison.root / "comparison.json", json.dumps(numbers, indent=1) + "\n")
    html = render_page(
        "comparison.html.j2",
        name=comparison.root.name,
        names=NAMES,
        metrics=comparison.metrics,
        quadrants=QUADRANTS,
        figures=draw_figures(comparison, numbers),
        samples=side_by_side(comparison),
        settings=dump_recipe(comparison.recipe),
        written=time.strftime("%Y-%m-%d %H:%M"),
        **numbers,
    )
    path = comparison.root / "report.html"
    replace_file(path, html)
    return path


def side_by_side(comparison: Comparison) -> list[Sample]:
    """The first held-out rows: the real response, the start's, and that of every method after its last iteration.

    From the first seed, on the largest fraction of the rows.
    """
    arms = [comparison.select(label, comparison.shares[-1])[0] for label in comparison.labels]
    by_arm = [collect(arm.results) for arm in arms]
    for number, sample in enumerate(by_arm[0]):
        last = [(arm.label, samples[number].responses[-1]) for arm, samples in zip(arms, by_arm, strict=True)]
        sample.responses = [*sample.responses[:2], *(replace(response, source=label) for label, response in last)]
        sample.is_truncated = any(response.finish == "length" for _, response in last)
        sample.is_wrong = any(response.correctness not in (None, 1) for _, response in last)
        sample.margin, sample.is_misaligned = None, False
    return by_arm[0]


def draw_figures(comparison: Comparison, numbers: Json) -> list[Figure]:
    """Per metric: curves over iterations on all rows and, with several fractions, the value by annotated rows."""
    figures = []
    arms: list[dict] = numbers["arms"]  # type: ignore[assignment]
    for metric in comparison.metrics:
        name = NAMES[metric]
        curves = [
            (arm["method"], [p["iteration"] for p in arm["curves"][metric]], arm["curves"][metric])
            for arm in arms
            if arm["share"] == comparison.shares[-1]
        ]
        caption = "Mean over seeds on all held-out rows. Error bars: 95% intervals between seeds."
        figures.append(Figure(name, caption, to_svg(plot_arms(curves, "iteration"), name, has_legend=True)))
        if len(comparison.shares) > 1:
            curves = []
            for label in comparison.labels:
                own = [arm for arm in reversed(arms) if arm["method"] == label]
                curves.append((label, [a["budget"]["annotations"] for a in own], [a["chosen"][metric] for a in own]))
            caption = "At each arm's chosen iteration, on the half of the prompts that did not choose it."
            title = f"{name} by annotated rows"
            figures.append(Figure(title, caption, to_svg(plot_arms(curves, "annotated rows"), title, has_legend=True)))
    return figures


def plot_arms(curves: Sequence[tuple[str, Sequence[float], Sequence[dict]]], xlabel: str) -> Callable[[Axes], None]:
    def plot(axes: Axes) -> None:
        for (label, x, points), (color, style) in zip(curves, STYLES, strict=False):
            errors = [p["half_width_95"] for p in points]
            y = [p["mean"] for p in points]
            error_bars(axes, x, y, None if None in errors else errors, color=color, linestyle=style, label=label)
        if xlabel == "iteration":
            iteration_ticks(axes, [int(x) for x in curves[0][1]])
        else:
            axes.locator_params(axis="x", integer=True)
            axes.margins(x=0.08)
            axes.set_xlabel(xlabel)

    return plot
