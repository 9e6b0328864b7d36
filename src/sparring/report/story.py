"""What was played and what came of it, in a few sentences that do not oversell."""

from __future__ import annotations

import numpy as np

from sparring.data.tables import read_rendered, read_table
from sparring.iteration import Iteration
from sparring.results import Results

NAMES = {
    "held_out_nll": "held-out NLL",
    "greedy_accuracy": "greedy accuracy",
    "sampled_accuracy": "sampled accuracy",
}


def story(results: Results) -> str:
    if results.data is None:
        return "The run has not read its data yet."
    evaluations, best = results.evaluations(), results.best()
    played = [index for index in evaluations if index >= 0]
    text = (
        f"{results.recipe.method.name} played {len(played)} of {results.recipe.iterations} iterations on "
        f"{results.data.num_train:,} prompts. "
    )
    if best is None or -1 not in evaluations or not played:
        return text + "There is nothing to compare yet."
    name, start = NAMES[best.metric], evaluations[-1][best.metric]
    last = evaluations[played[-1]][best.metric]
    if best.iteration < 0:
        return text + f"No iteration beats the starting model by {name}: {start:.4f} at first, {last:.4f} at last."
    change, error = paired_difference(results, best.metric, best.iteration)
    text += (
        f"The best by {name} is iteration {best.iteration}: {best.value:.4f}, from {start:.4f} at the start, "
        f"a change of {change:+.4f} ± {error:.4f} (one standard error, paired over the held-out rows). "
    )
    if abs(change) < 2 * error:
        text += "That is less than two standard errors: more held-out rows are needed to tell it from chance. "
    if best.iteration != played[-1]:
        text += f"After it the metric got worse again, to {last:.4f}. "
    return text


def paired_difference(results: Results, metric: str, index: int) -> tuple[float, float]:
    """(change of a metric from the start to iteration `index`, its standard error), row by row."""
    rows = read_rendered(results.run.data / "held_out.parquet")
    tables = [
        read_table(Iteration(results.run, results.recipe, t).stage("evaluate") / "answers.parquet") for t in (-1, index)
    ]
    if metric == "held_out_nll":
        before, after = (-table["real_logprob"].to_numpy() for table in tables)
        weights = np.array([len(row.real_ids) for row in rows])
    else:
        column = "is_greedy_correct" if metric == "greedy_accuracy" else "is_correct"
        found = [table[column].to_pylist() for table in tables]
        both = [(b, a) for b, a in zip(*found, strict=True) if b is not None and a is not None]
        before, after = np.array(both, dtype=np.float64).T
        weights = np.ones(len(both))
    difference = (after - before).astype(np.float64)
    change = difference.sum() / weights.sum()
    return float(change), float(np.sqrt(((difference - change * weights) ** 2).sum()) / weights.sum())
