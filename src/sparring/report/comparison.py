"""Several runs of one comparison -> numbers with their uncertainty, as JSON and as one HTML file.

Two kinds of uncertainty are told apart: between seeds (Student's t), and between held-out rows (paired bootstrap of the
difference to the control, averaged over seeds). Which iteration an arm is judged by is chosen on one half of the
held-out rows and judged on the other, for every method alike: for SFT that is early stopping.
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
import pyarrow as pa
from jaxtyping import Bool, Float

from sparring.data.tables import read_rendered, read_table
from sparring.errors import UserError
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe
from sparring.report import page
from sparring.report.bars import QUADRANTS
from sparring.report.figures import COLOURS, Figure, svg
from sparring.report.samples import Sample, collect
from sparring.report.story import NAMES
from sparring.run.iteration import seed_of
from sparring.run.manifest import Json, read_manifest, read_sealed, replace_file, verified
from sparring.run.results import Results
from sparring.run.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESAMPLES = 2000
STYLES = [(colour, style) for style in ("-", "--", ":", "-.") for colour in COLOURS.values()]
"""Colour and dashes of the arms, in their order."""

# quantiles of Student's t at 97.5 %, by degrees of freedom; 1.96 + 2.7 / n is within 0.01 above the true one from 10 on
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Arm:
    """One method with one seed on one share of the rows: a run directory."""

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

    @cached_property
    def tables(self) -> list[pa.Table]:
        """What was answered on the held-out rows, by the start and after each iteration."""
        return [
            read_table(verified(iteration.stage("evaluate"), "answers.parquet"))
            for iteration in self.results.iterations
        ]

    def per_row(self, metric: str, index: int) -> Float[np.ndarray, " rows"]:
        """The metric of each held-out row after an iteration: nats of the real answer, or 0 and 1; NaN: unchecked."""
        table = self.tables[index + 1]
        if metric == "held_out_nll":
            return -table["real_logprob"].to_numpy().astype(np.float64)
        column = table["is_greedy_correct" if metric == "greedy_accuracy" else "is_correct"].to_pylist()
        return np.array([np.nan if value is None else float(value) for value in column])

    def budget(self) -> dict[str, float]:
        """What it was given: annotations, tokens through the optimizer, seconds of all stages, shared ones included."""
        lines = [line for index in range(self.last + 1) for line in self.results.training(index)]
        stages = [stage for stage in self.results.stages() if stage.iteration >= 0 and stage.stage != "evaluate"]
        return {
            "annotations": self.results.data.num_train if self.results.data else 0,
            "optimizer_tokens": sum(line["num_tokens"] for line in lines),
            "seconds": sum(stage.seconds or 0.0 for stage in stages),
        }


class Comparison:
    """All arms of a comparison, refused unless they were evaluated alike."""

    def __init__(self, root: Path, recipe: Recipe, arms: Sequence[Arm]) -> None:
        self.root, self.recipe, self.arms = root, recipe, arms
        check_comparable(arms)
        self.labels = list(dict.fromkeys(arm.label for arm in arms))
        self.shares = sorted({arm.share for arm in arms})
        self.control = "sft" if "sft" in self.labels else self.labels[0]
        self.metrics = ["held_out_nll"]
        if recipe.evaluate.checker is not None:
            self.metrics += ["greedy_accuracy", "sampled_accuracy"]
        rows = read_rendered(verified(arms[0].run.data, "held_out.parquet"))
        self.tokens = np.array([len(row.real_ids) for row in rows], dtype=np.float64)
        self.is_dev: Bool[np.ndarray, " rows"] = np.array([seed_of("dev", row.id) % 2 == 0 for row in rows])

    def of(self, label: str, share: float) -> list[Arm]:
        return [arm for arm in self.arms if (arm.label, arm.share) == (label, share)]

    def weights(self, metric: str) -> np.ndarray:
        return self.tokens if metric == "held_out_nll" else np.ones_like(self.tokens)

    def value(self, arm: Arm, metric: str, index: int, rows: np.ndarray) -> float:
        per_row, weights = arm.per_row(metric, index)[rows], self.weights(metric)[rows]
        counted = ~np.isnan(per_row)
        return float(per_row[counted].sum() / weights[counted].sum())

    def chosen(self, arm: Arm) -> int:
        """The iteration that is best on one half of the held-out rows, by the recipe's save_best_by; -1: the start."""
        metric = self.recipe.evaluate.save_best_by
        sign = 1 if metric == "held_out_nll" else -1
        return min(range(-1, arm.last + 1), key=lambda t: (sign * self.value(arm, metric, t, self.is_dev), t))

    def curve(self, label: str, share: float, metric: str) -> list[Json]:
        everything = np.ones_like(self.is_dev)
        arms = self.of(label, share)
        return [
            {"iteration": t, **over_seeds([self.value(arm, metric, t, everything) for arm in arms])}
            for t in range(-1, arms[0].last + 1)
        ]

    def judged(self, label: str, share: float, metric: str) -> Json:
        """At its chosen iteration, on the rows that did not choose it."""
        arms = self.of(label, share)
        found = over_seeds([self.value(arm, metric, self.chosen(arm), ~self.is_dev) for arm in arms])
        return {**found, "iterations": [self.chosen(arm) for arm in arms]}

    def difference(self, label: str, share: float, metric: str, *, against: float, at: str) -> Json:
        """To the control on the share `against`, paired by seed and row; `at` the last or the chosen iteration."""
        rows = np.ones_like(self.is_dev) if at == "last" else ~self.is_dev
        weights = self.weights(metric)[rows]
        per_seed = []
        for arm, control in zip(self.of(label, share), self.of(self.control, against), strict=True):
            where = [(a, a.last if at == "last" else self.chosen(a)) for a in (arm, control)]
            ours, theirs = (a.per_row(metric, index)[rows] for a, index in where)
            per_seed.append(ours - theirs)
        counted = ~np.isnan(per_seed[0])
        kept, of_rows = np.array(per_seed)[:, counted], weights[counted]
        by_seed = kept.sum(axis=1) / of_rows.sum()
        return {**over_seeds(by_seed.tolist()), "rows_95": bootstrap(kept.mean(axis=0), of_rows)}

    def as_json(self) -> Json:
        every = [(label, share) for share in reversed(self.shares) for label in self.labels]
        budgets = {arm: arm.budget() for arm in self.arms}
        found = []
        for label, share in every:
            arms = self.of(label, share)
            ends = [arm.results.evaluation(arm.last) or {} for arm in arms]
            found.append(
                {
                    "method": label,
                    "share": share,
                    "budget": {key: mean([budgets[arm][key] for arm in arms]) for key in budgets[arms[0]]},
                    "curves": {metric: self.curve(label, share, metric) for metric in self.metrics},
                    "chosen": {metric: self.judged(label, share, metric) for metric in self.metrics},
                    "to_control": {
                        at: {m: self.difference(label, share, m, against=share, at=at) for m in self.metrics}
                        for at in ("last", "chosen")
                    },
                    "to_control_on_all_rows": {
                        metric: self.difference(label, share, metric, against=self.shares[-1], at="chosen")
                        for metric in self.metrics
                    },
                    "quadrants": {
                        key: mean([end[key] for end in ends]) for key, _ in QUADRANTS if all(key in end for end in ends)
                    },
                }
            )
        env = json.loads(read_sealed(self.arms[0].run.env))["sessions"][0]
        return {
            "control": self.control,
            "seeds": len({arm.seed for arm in self.arms}),
            "held_out_rows": len(self.tokens),
            "chosen_by": self.recipe.evaluate.save_best_by,
            "machine": {key: env[key] for key in ("machine", "device", "threads", "versions", "commit")},
            "arms": found,
            "recipe": self.recipe.model_dump(by_alias=True, mode="json"),
        }


def check_comparable(arms: Sequence[Arm]) -> None:
    """Refuses arms that were not evaluated on the same rows in the same way."""
    first: dict[str, object] = {}
    for arm in arms:
        recipe, data = arm.results.recipe, arm.results.data
        files = read_manifest(arm.run.data).files
        ways: dict[str, object] = {
            "the held-out rows": files["held_out.parquet"]["xxh3"],
            "the starting model": data.model if data else None,
            "the template": data.template_digest if data else None,
            "evaluate.checker": recipe.evaluate.checker,
            "generate": recipe.generate,
            "train.dtype": recipe.train.dtype,
            "iterations": recipe.iterations,
        }
        for what, value in ways.items():
            if first.setdefault(what, value) != value:
                raise UserError(
                    f"{arm.run.root} cannot be compared with {arms[0].run.root}: {what} differs. Move it "
                    "away and run the same command again"
                )


def over_seeds(values: Sequence[float]) -> Json:
    """Mean, and the half-width of the 95 % interval between seeds; None for a single one."""
    n = len(values)
    quantile = T[n - 2] if 2 <= n <= len(T) + 1 else 1.96 + 2.7 / n
    half = quantile * float(np.std(values, ddof=1)) / n**0.5 if n > 1 else None
    return {"mean": mean(values), "half_width_95": half, "seeds": list(values)}


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def bootstrap(values: Float[np.ndarray, " rows"], weights: Float[np.ndarray, " rows"]) -> list[float]:
    """95 % percentile interval of sum(values) / sum(weights), rows drawn with replacement."""
    random = np.random.Generator(np.random.Philox(key=seed_of("bootstrap", len(values))))
    found = []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, len(values), len(values))
        found.append(values[drawn].sum() / weights[drawn].sum())
    low, high = np.quantile(found, [0.025, 0.975])
    return [float(low), float(high)]


def write_comparison(comparison: Comparison) -> Path:
    """Writes comparison.json and report.html."""
    numbers = comparison.as_json()
    replace_file(comparison.root / "comparison.json", json.dumps(numbers, indent=1) + "\n")
    html = page(
        "comparison.html.j2",
        name=comparison.root.name,
        names=NAMES,
        metrics=comparison.metrics,
        quadrants=QUADRANTS,
        figures=figures(comparison, numbers),
        samples=side_by_side(comparison),
        settings=dump_recipe(comparison.recipe),
        written=time.strftime("%Y-%m-%d %H:%M"),
        **numbers,
    )
    path = comparison.root / "report.html"
    replace_file(path, html)
    return path


def side_by_side(comparison: Comparison) -> list[Sample]:
    """The first held-out rows: the real answer, the start's, and that of every method after its last iteration.

    Of the first seed, on the largest share of the rows.
    """
    arms = [comparison.of(label, comparison.shares[-1])[0] for label in comparison.labels]
    found = [collect(arm.results) for arm in arms]
    for number, sample in enumerate(found[0]):
        last = [(arm.label, samples[number].answers[-1]) for arm, samples in zip(arms, found, strict=True)]
        sample.answers = [*sample.answers[:2], *(replace(answer, source=label) for label, answer in last)]
        sample.is_cut = any(answer.finish == "length" for _, answer in last)
        sample.is_wrong = any(answer.is_correct is False for _, answer in last)
        sample.margin, sample.is_misaligned = None, False
    return found[0]


def figures(comparison: Comparison, numbers: Json) -> list[Figure]:
    """Per metric: curves over iterations on all rows, and, with several shares, the value against the annotations."""
    found = []
    arms: list[dict] = numbers["arms"]  # type: ignore[assignment]
    for metric in comparison.metrics:
        whole = [arm for arm in arms if arm["share"] == comparison.shares[-1]]
        curves = [
            (arm["method"], [p["iteration"] for p in arm["curves"][metric]], arm["curves"][metric]) for arm in whole
        ]
        caption = "Mean over seeds on all held-out rows, bars the 95 % interval between seeds."
        found.append(Figure(NAMES[metric], caption, svg(lines(curves, "iteration"), NAMES[metric], has_legend=True)))
        if len(comparison.shares) > 1:
            curves = []
            for label in comparison.labels:
                mine = [arm for arm in reversed(arms) if arm["method"] == label]
                curves.append((label, [a["budget"]["annotations"] for a in mine], [a["chosen"][metric] for a in mine]))
            caption = "At each arm's chosen iteration, on the half of the rows that did not choose it."
            title = f"{NAMES[metric]} by annotations"
            found.append(Figure(title, caption, svg(lines(curves, "annotated rows"), title, has_legend=True)))
    return found


def lines(curves: Sequence[tuple[str, Sequence[float], Sequence[dict]]], xlabel: str) -> Callable[[Axes], None]:
    def plot(axes: Axes) -> None:
        for (label, x, points), (colour, style) in zip(curves, STYLES, strict=False):
            errors = [p["half_width_95"] for p in points]
            axes.errorbar(
                x,
                [p["mean"] for p in points],
                yerr=None if None in errors else errors,
                color=colour,
                linestyle=style,
                marker="o",
                markersize=4,
                linewidth=1.6,
                elinewidth=1,
                capsize=2.5,
                label=label,
            )
        if xlabel == "iteration":
            every = curves[0][1]
            axes.set_xticks(every, ["start" if x < 0 else str(x) for x in every])
        else:
            axes.locator_params(axis="x", integer=True)
        axes.margins(x=0.08)
        axes.set_xlabel(xlabel)

    return plot
