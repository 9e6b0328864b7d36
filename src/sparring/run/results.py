"""What a run has produced so far: the state of every stage, metrics, the best iteration. Read-only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Literal

import numpy as np

from sparring.data.tables import read_rendered, read_table
from sparring.errors import UserError
from sparring.recipe.schema import Recipe
from sparring.run.iteration import DataSummary, Iteration
from sparring.run.manifest import Json, is_committed, read_manifest, verified
from sparring.run.rundir import BENCHMARKS, JUDGED, RunDir
from sparring.run.session import load_sealed_recipe

LEVEL = 0.1
"""Largest half-width of the interval of wins minus losses at which equilibrium is declared: about 400 rows."""

FLAT = 1e-3
"""A change, in nats per token or as a fraction, that counts as no change whatever its standard error."""

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
class Best:
    iteration: int  # -1: no iteration is better than the start
    metric: str
    value: float


class Results:
    """Reads a run directory. Leaves out what does not exist yet, so it works at any time during a run."""

    def __init__(self, root: str | Path) -> None:
        self.run = RunDir(root)
        if not self.run.recipe.is_file():
            raise UserError(f"{self.run.root} is not a run directory: it has no recipe.yaml")
        self.recipe: Recipe = load_sealed_recipe(self.run.recipe)

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
        sign = 1 if metric == "held_out_nll" else -1
        values = {t: m[metric] for t in range(-1, index + 1) if (m := self.evaluation(t))}
        best = min(values, key=lambda t: (sign * values[t], t))
        if stop.decline and index - best >= stop.decline:
            return f"no better {metric} in {index - best} iterations"
        if (
            stop.equilibrium
            and self.is_level(found)
            and all(self.is_flat(guard, index) for guard in self.guards(found))
        ):
            return f"equilibrium: {found['rewards/accuracies']:.1%} of the held-out rows are wins"
        return None

    def is_level(self, metrics: Mapping[str, float]) -> bool:
        """Whether wins and losses balance, by an interval that is narrow enough to tell."""
        if "rewards/accuracies" not in metrics:
            return False
        won, tied = metrics["rewards/accuracies"], metrics["rewards/ties"]
        lead = 2 * won + tied - 1
        assert self.data is not None
        half = 1.96 * sqrt(max(0.0, 1 - tied - lead**2) / self.data.num_held_out)
        return abs(lead) <= half <= LEVEL

    def guards(self, metrics: Mapping[str, float]) -> list[str]:
        return [name for name in ("held_out_nll", "greedy_accuracy") if name in metrics]

    def is_flat(self, metric: str, index: int) -> bool:
        """Whether an iteration left a metric unchanged, within two standard errors, paired by row."""
        change, error = self.paired_difference(metric, index - 1, index)
        return abs(change) <= max(2 * error, FLAT)

    def paired_difference(self, metric: str, before: int, after: int) -> tuple[float, float]:
        """(change of a metric between two iterations, its standard error), paired by row; -1 is the start."""
        rows = read_rendered(verified(self.run.data, "held_out.parquet"))
        tables = [
            read_table(verified(Iteration(self.run, self.recipe, t).stage("evaluate"), "answers.parquet"))
            for t in (before, after)
        ]
        if metric == "held_out_nll":
            old, new = (-table["real_logprob"].to_numpy() for table in tables)
            weights = np.array([len(row.real_ids) for row in rows])
        else:
            column = "is_greedy_correct" if metric == "greedy_accuracy" else "is_correct"
            found = [table[column].to_pylist() for table in tables]
            both = [(b, a) for b, a in zip(*found, strict=True) if b is not None and a is not None]
            old, new = np.array(both, dtype=np.float64).T
            weights = np.ones(len(both))
        difference = (new - old).astype(np.float64)
        change = difference.sum() / weights.sum()
        return float(change), float(np.sqrt(((difference - change * weights) ** 2).sum()) / weights.sum())

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

    def benchmarks(self) -> dict[tuple[str, str], dict[int, tuple[float, float | None]]]:
        """(benchmark, metric) -> iteration -> (value, standard error); -1 is the start."""
        if self.data is None:
            return {}
        found: dict[tuple[str, str], dict[int, tuple[float, float | None]]] = {}
        for iteration in self.iterations:
            for stage in iteration.stages:
                if stage.startswith(BENCHMARKS) and is_committed(iteration.stage(stage)):
                    metrics = self.benchmark(iteration, stage)
                    for name, value in metrics.items():
                        if not name.endswith("_stderr"):
                            key = (stage.removeprefix(f"{BENCHMARKS}/"), name)
                            found.setdefault(key, {})[iteration.index] = (value, metrics.get(f"{name}_stderr"))
        for folder in sorted((self.run.root / JUDGED).glob("*")):
            if is_committed(folder):
                metrics = json.loads(verified(folder, "metrics.json").read_text(encoding="utf-8"))
                other = "the start" if metrics["against"] < 0 else f"iteration {metrics['against']}"
                key = (f"MT-Bench by {metrics['judge']}", f"wins and half of the ties, against {other}")
                found.setdefault(key, {})[metrics["iteration"]] = (metrics["score"], metrics["score_stderr"])
        return found

    def headline(self, iteration: Iteration, stage: str) -> str:
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

    def best(self) -> Best | None:
        """The iteration with the best value of evaluate.save_best_by; the earliest of equals."""
        metric = self.recipe.evaluate.save_best_by
        sign = 1 if metric == "held_out_nll" else -1
        values = {index: m[metric] for index, m in self.evaluations().items()}
        if not values:
            return None
        index = min(values, key=lambda i: (sign * values[i], i))
        return Best(index, metric, values[index])

    def as_json(self) -> Json:
        best = self.best()
        return {
            "run": str(self.run.root),
            "method": self.recipe.method.name,
            "iterations": self.recipe.iterations,
            "stopped": self.stopped,
            "owner": self.run.owner(),
            "data": asdict(self.data) if self.data else None,
            "stages": [asdict(stage) for stage in self.stages()],
            "best": asdict(best) if best else None,
            "report": str(self.run.report) if self.run.report.is_file() else None,
        }


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
