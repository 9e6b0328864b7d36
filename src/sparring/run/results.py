"""What a run has produced so far: the state of every stage, metrics, the best iteration. Read-only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float

from sparring.data.tables import read_rendered, read_table
from sparring.errors import UserError
from sparring.recipe.schema import Recipe
from sparring.run.estimate import DIFFERENCE, FLAT, FRACTION, Estimate, estimate, halves
from sparring.run.iteration import DataSummary, Iteration
from sparring.run.manifest import Json, is_committed, read_manifest, verified
from sparring.run.rundir import BENCHMARKS, JUDGED, RunDir
from sparring.run.session import load_sealed_recipe
from sparring.types import Objective

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

LEVEL = 0.1
"""Largest half-width of the interval of wins minus losses at which equilibrium is declared: about 400 rows."""

MEASURED = ("held_out_nll", "greedy_accuracy", "sampled_accuracy")
"""The metrics whose value on every held-out row is kept, so that changes are paired by row."""

State = Literal["done", "running", "to do"]

SUMMARY_METRICS = (
    "held_out_nll",
    "greedy_accuracy",
    "sampled_accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "alignment",
    "length",
    "end_rate",
)
"""The evaluation metrics of a one-line summary of an iteration."""


@dataclass(frozen=True)
class StageState:
    iteration: int  # -1 is the starting model
    stage: str
    state: State
    seconds: float | None
    peak_memory_mib: float | None  # of the device if it counts its own, otherwise of the process
    progress: str | None  # of a stage that has started
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Headline:
    """An iteration, and its metrics on held-out rows that had no part in choosing the best one."""

    iteration: int
    best: int  # -1: no iteration is better than the start
    chosen_by: str  # evaluate.save_best_by
    choosing_prompts: int | None  # None: there is one iteration, so nothing to choose, or one prompt
    start: Mapping[str, Estimate]
    value: Mapping[str, Estimate]
    change: Mapping[str, Estimate]


class Results:
    """Reads a run directory. Leaves out what does not exist yet, so it works at any time during a run."""

    def __init__(self, root: str | Path) -> None:
        self.run = RunDir(root)
        if not self.run.recipe.is_file():
            raise UserError(f"{self.run.root} is not a run directory: it has no recipe.yaml")
        self.recipe: Recipe = load_sealed_recipe(self.run.recipe)
        self._answers: dict[int, pa.Table] = {}

    def __repr__(self) -> str:
        """What was played and where the report is, for a notebook or a prompt."""
        count = self.recipe.iterations
        trained = sum(is_committed(self.run.stage(index, "train")) for index in range(count))
        report = self.run.report if self.run.report.is_file() else "not written yet"
        return f"{name_methods(self.recipe)}: {trained} of {count} iterations trained; report: {report}"

    @cached_property
    def data(self) -> DataSummary | None:
        return DataSummary.read(verified(self.run.data, "summary.json")) if is_committed(self.run.data) else None

    @cached_property
    def iterations(self) -> list[Iteration]:
        """The start (-1) and every iteration, up to the one after which the run stopped early."""
        end = self.stopped[0] + 1 if self.stopped else self.recipe.iterations
        return [Iteration(self.run, self.recipe.at(index), index) for index in range(-1, end)]

    @cached_property
    def stopped(self) -> tuple[int, str] | None:
        """The iteration after which the run stopped early, and why."""
        for index in range(self.recipe.iterations - 1):
            if reason := self.reason_to_stop(index):
                return index, reason
        return None

    def reason_to_stop(self, index: int) -> str | None:
        """Why the recipe's `stop` ends the run after this iteration; None if it continues."""
        stop, metric = self.recipe.stop, self.recipe.evaluate.save_best_by
        found = self.evaluation(index) if stop.decline or stop.equilibrium else None
        if found is None:
            return None
        best = self.best_of(t for t in range(-1, index + 1) if self.evaluation(t))
        if stop.decline and index - best >= stop.decline:
            return f"no better {metric} in {index - best} iterations"
        if (
            stop.equilibrium
            and self.is_level(found)
            and all(self.is_flat(guard, index) for guard in MEASURED[:2] if guard in found)
        ):
            return f"equilibrium: {found['rewards/accuracies']:.1%} of the held-out rows are wins"
        return None

    def is_level(self, metrics: Mapping[str, float]) -> bool:
        """Whether wins and losses balance, by an interval that is narrow enough to tell."""
        low, high = (metrics.get(f"rewards/lead_{end}") for end in ("low", "high"))
        return low is not None and high is not None and low <= 0 <= high and (high - low) / 2 <= LEVEL

    def is_flat(self, metric: str, index: int) -> bool:
        """Whether an iteration left a metric unchanged, by the interval of the change or by its size."""
        change = self.change(metric, index - 1, index)
        return abs(change.mean) <= FLAT or (change.low is not None and change.sign == 0)

    @cached_property
    def held_out(self) -> tuple[np.ndarray, Float[np.ndarray, " rows"]]:
        """(prompt of each held-out row, tokens of its real response)."""
        rows = read_rendered(verified(self.run.data, "held_out.parquet"))
        return np.array([row.prompt_key for row in rows]), np.array([float(len(row.real_ids)) for row in rows])

    @cached_property
    def halves(self) -> tuple[Bool[np.ndarray, " rows"], Bool[np.ndarray, " rows"]]:
        """(held-out rows that choose the best iteration, those that judge it)."""
        return halves(self.held_out[0])

    @property
    def all_rows(self) -> Bool[np.ndarray, " rows"]:
        return np.ones(len(self.held_out[0]), dtype=bool)

    def per_row(self, metric: str, index: int) -> Float[np.ndarray, " rows"]:
        """The metric of each held-out row after an iteration: nats of the real response, 0 to 1 (NaN: unchecked), or,
        for `length`, the tokens of the response."""
        if index not in self._answers:
            folder = Iteration(self.run, self.recipe, index).stage("evaluate")
            self._answers[index] = read_table(verified(folder, "answers.parquet"))
        table = self._answers[index]
        if metric == "held_out_nll":
            return -table["real_logprob"].to_numpy().astype(np.float64)
        if metric == "length":
            return np.array([float(len(tokens)) for tokens in table["token_ids"].to_pylist()])
        column = table["greedy_correctness" if metric == "greedy_accuracy" else "correctness"].to_pylist()
        return np.array([np.nan if value is None else float(value) for value in column])

    def estimate(
        self, metric: str, values: Float[np.ndarray, " rows"], rows: Bool[np.ndarray, " rows"], *, is_change: bool
    ) -> Estimate:
        """The metric from its values on `rows`, or a change from their differences."""
        prompts, tokens = self.held_out
        if metric == "held_out_nll":
            return estimate(values[rows], tokens[rows], prompts[rows])
        if metric == "length":
            return estimate(values[rows], clusters=prompts[rows])
        return estimate(values[rows], clusters=prompts[rows], bounds=DIFFERENCE if is_change else FRACTION)

    def value(self, metric: str, index: int, rows: Bool[np.ndarray, " rows"]) -> Estimate:
        return self.estimate(metric, self.per_row(metric, index), rows, is_change=False)

    def change(self, metric: str, before: int, after: int, rows: Bool[np.ndarray, " rows"] | None = None) -> Estimate:
        """The change of a metric between two iterations, paired by row; -1 is the start."""
        rows = self.all_rows if rows is None else rows
        return self.estimate(metric, self.per_row(metric, after) - self.per_row(metric, before), rows, is_change=True)

    def best_of(self, iterations: Iterable[int], rows: Bool[np.ndarray, " rows"] | None = None) -> int:
        """The iteration with the best evaluate.save_best_by on the rows that choose; the earliest of equals.

        A single iteration is shown in any case, so all rows tell whether it is better than the start.
        """
        metric, candidates = self.recipe.evaluate.save_best_by, list(iterations)
        sign = 1 if metric == "held_out_nll" else -1
        if rows is None:
            rows = self.halves[0] if len(candidates) > 2 else self.all_rows
        values = {t: sign * self.value(metric, t, rows).mean for t in candidates}
        return min(values, key=lambda t: (isnan(values[t]), values[t], t))  # NaN: no row could be checked

    def best(self) -> int | None:
        """The best of the evaluated iterations; -1: none is better than the start."""
        evaluated = list(self.evaluations())
        return self.best_of(evaluated) if evaluated else None

    def best_model(self) -> Path | None:
        """The folder of the best model: the starting model if no iteration is better, None before any evaluation."""
        best = self.best()
        return None if best is None else Iteration(self.run, self.recipe, best).policy

    def to_pandas(self) -> DataFrame:
        """The metrics on held-out rows by iteration; -1 is the start. Raises `UserError` if pandas is not installed."""
        evaluations = self.evaluations()
        frame = data_frame([{"iteration": index, **metrics} for index, metrics in evaluations.items()])
        return frame.set_index("iteration") if evaluations else frame

    def plot(self, metric: str | None = None, axes: Axes | None = None) -> Axes:
        """Draws a metric on held-out rows by iteration, with 95% intervals over prompts where it has them.

        None: the metric that chooses the best iteration. Raises `UserError` if no evaluation has it.
        """
        metric = metric or self.recipe.evaluate.save_best_by
        found = {index: metrics for index, metrics in self.evaluations().items() if metric in metrics}
        if not found:
            known = sorted({name for metrics in self.evaluations().values() for name in metrics})
            raise UserError(f"plot: {metric} has not been evaluated. Choose one of {', '.join(known) or 'none yet'}.")
        from matplotlib import pyplot

        axes = axes or pyplot.subplots()[1]
        y = np.array([metrics[metric] for metrics in found.values()])
        ends = [[metrics.get(f"{metric}_{end}", np.nan) for metrics in found.values()] for end in ("low", "high")]
        axes.errorbar(list(found), y, np.abs(np.array(ends) - y), marker="o", capsize=2.5, label=self.run.root.name)
        axes.set_xticks(list(found), ["start" if index < 0 else str(index) for index in found])
        axes.set(xlabel="iteration", ylabel=metric)
        return axes

    def headline(self, index: int | None = None) -> Headline | None:
        """An iteration on the rows that do not choose: by default the best one, or the last if none beats the start."""
        evaluations, best = self.evaluations(), self.best()
        done = [index for index in evaluations if index >= 0]
        if best is None or -1 not in evaluations or not done:
            return None
        if index is None:
            index = best if best >= 0 else done[-1]
        elif index not in done:
            return None
        choosing, judging = self.halves
        is_chosen = len(done) > 1 and not (choosing & judging).any()
        rows = judging if is_chosen else self.all_rows
        metrics = [metric for metric in MEASURED if metric in evaluations[index]]
        return Headline(
            iteration=index,
            best=best,
            chosen_by=self.recipe.evaluate.save_best_by,
            choosing_prompts=len(set(self.held_out[0][choosing])) if is_chosen else None,
            start={metric: self.value(metric, -1, rows) for metric in metrics},
            value={metric: self.value(metric, index, rows) for metric in metrics},
            change={metric: self.change(metric, -1, index, rows) for metric in metrics},
        )

    def stages(self) -> list[StageState]:
        if self.data is None:
            return []
        found: list[StageState] = []
        is_owned = self.run.owner() is not None
        for iteration in self.iterations:
            for stage in iteration.stages:
                path = iteration.stage(stage)
                is_next = all(other.state == "done" for other in found)
                if is_committed(path):
                    info = read_manifest(path).info
                    metrics = self.evaluation(iteration.index) or {} if stage == "evaluate" else {}
                    kept = {name: metrics[name] for name in SUMMARY_METRICS if name in metrics}
                    if stage.startswith(BENCHMARKS):
                        kept = dict([next(iter(self.benchmark(iteration, stage).items()))])
                    seconds, memory = (float(str(info[name])) for name in ("seconds", "peak_memory_mib"))
                    found.append(StageState(iteration.index, stage, "done", seconds, memory, None, kept))
                else:
                    state: State = "running" if is_owned and is_next else "to do"
                    found.append(StageState(iteration.index, stage, state, None, None, _progress(path), {}))
        return found

    def evaluation(self, index: int) -> dict[str, float] | None:
        """The held-out metrics of an iteration's policy, or of the start (-1)."""
        folder = Iteration(self.run, self.recipe, index).stage("evaluate")
        if not is_committed(folder):
            return None
        return json.loads(verified(folder, "metrics.json").read_text(encoding="utf-8"))

    def evaluations(self) -> dict[int, dict[str, float]]:
        every = {iteration.index: self.evaluation(iteration.index) for iteration in self.iterations}
        return {index: metrics for index, metrics in every.items() if metrics is not None}

    def benchmark(self, iteration: Iteration, stage: str) -> dict[str, float]:
        """The metrics of a finished benchmark, its main metric first."""
        folder = iteration.stage(stage)
        return json.loads(verified(folder, "metrics.json").read_text(encoding="utf-8"))

    def benchmarks(self) -> dict[tuple[str, str], dict[int, tuple[float, str]]]:
        """(benchmark, metric) -> iteration -> (value, its spread as text); -1 is the start."""
        if self.data is None:
            return {}
        found: dict[tuple[str, str], dict[int, tuple[float, str]]] = {}
        for iteration in self.iterations:
            for stage in iteration.stages:
                if stage.startswith(BENCHMARKS) and is_committed(iteration.stage(stage)):
                    metrics = self.benchmark(iteration, stage)
                    for name, value in metrics.items():
                        if not name.endswith("_stderr"):
                            key, error = (stage.removeprefix(f"{BENCHMARKS}/"), name), metrics.get(f"{name}_stderr")
                            spread = "" if error is None else f"± {error:.2g}"
                            found.setdefault(key, {})[iteration.index] = (value, spread)
        for folder in sorted((self.run.root / JUDGED).glob("*")):
            if is_committed(folder):
                metrics = json.loads(verified(folder, "metrics.json").read_text(encoding="utf-8"))
                other = "the start" if metrics["against"] < 0 else f"iteration {metrics['against']}"
                key = (f"MT-Bench by {metrics['judge']}", f"wins and half of the ties, against {other}")
                ends = [metrics[f"score_{end}"] for end in ("low", "high") if f"score_{end}" in metrics]
                spread = "[{:.4g}, {:.4g}]".format(*ends) if ends else ""
                found.setdefault(key, {})[metrics["iteration"]] = (metrics["score"], spread)
        return found

    def describe_stage(self, iteration: Iteration, stage: str) -> str:
        """The main metrics of an evaluation, or the first metric of a benchmark, for one line."""
        if stage == "evaluate":
            metrics = self.evaluation(iteration.index) or {}
            shown = {
                "held_out_nll": "held-out NLL {:.4f}",
                "greedy_accuracy": "greedy accuracy {:.3f}",
                "sampled_accuracy": "sampled accuracy {:.3f}",
                "rewards/accuracies": "reward accuracy {:.3f}",
            }
            return " | " + ", ".join(text.format(metrics[name]) for name, text in shown.items() if name in metrics)
        if not stage.startswith(BENCHMARKS):
            return ""
        metrics = self.benchmark(iteration, stage)
        name, value = next(iter(metrics.items()))
        error = f" ± {metrics[f'{name}_stderr']:.2g}" if f"{name}_stderr" in metrics else ""
        return f" | {name} {value:.4g}{error}"

    def training(self, index: int) -> list[dict[str, float]]:
        """The lines of an iteration's metrics.jsonl, also while it trains."""
        final = self.run.stage(index, "train")
        is_done = is_committed(final)
        path = verified(final, "metrics.jsonl") if is_done else self.run.work(final) / "metrics.jsonl"
        if not path.is_file():
            return []
        lines = path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]  # the last one may be incomplete

    def as_json(self) -> Json:
        headline = self.headline()
        return {
            "run": str(self.run.root),
            "method": name_methods(self.recipe),
            "iterations": self.recipe.iterations,
            "stopped": self.stopped,
            "owner": self.run.owner(),
            "data": asdict(self.data) if self.data else None,
            "stages": [asdict(stage) for stage in self.stages()],
            "headline": asdict(headline) if headline else None,
            "report": str(self.run.report) if self.run.report.is_file() else None,
        }


def data_frame(rows: Sequence[Mapping[str, object]]) -> DataFrame:
    """The rows as a pandas DataFrame. Raises `UserError` if pandas is not installed."""
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise UserError("to_pandas: pandas is not installed. Run pip install pandas.") from error
    return DataFrame(list(rows))


def phases(recipe: Recipe, count: int) -> list[tuple[Objective, list[int]]]:
    """(method, its iterations) of the first `count` iterations: one pair unless per_iteration changes the method."""
    by_name = groupby(range(count), key=lambda index: recipe.at(index).method.name)
    return [(recipe.at(indices[-1]).method, indices) for indices in (list(group) for _, group in by_name)]


def name_methods(recipe: Recipe) -> str:
    """The run's methods in their order, such as "sft, then spin"."""
    return ", then ".join(method.name for method, _ in phases(recipe, recipe.iterations))


def _progress(path: Path) -> str | None:
    """The progress of an uncommitted stage, from its partial results."""
    work = RunDir.work(path)
    if parts := len(list(work.glob("part-*.parquet"))):
        return f"{parts} parts"
    metrics = work / "metrics.jsonl"
    if metrics.is_file():
        steps = metrics.read_bytes().count(b"\n")
        return f"{steps} steps"
    return None
