"""The few numbers that a reader sees first: start, best iteration, and whether the change is more than chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparring.report.figures import Z95
from sparring.run.results import FLAT, Results

GUARDS = (
    ("held_out_nll", "Held-out NLL", "nats per token of real answers", -1),
    ("greedy_accuracy", "Greedy accuracy", "right answers, decoded greedily", 1),
    ("sampled_accuracy", "Sampled accuracy", "right answers, one sample each", 1),
)
"""Metric, name, unit, and the sign of a change for the better."""

SHARES = ("greedy_accuracy", "sampled_accuracy", "rewards/accuracies", "end_rate", "repetition")
"""What reads better in per cent."""


@dataclass(frozen=True)
class Tile:
    name: str
    unit: str
    start: str
    value: str
    change: str  # with the half-width of its 95 % interval, paired over the rows
    verdict: Literal["better", "worse", "no difference shown"]


def headline_index(results: Results) -> int | None:
    """The iteration that the headline is about: the best one, or the last where none beats the start."""
    evaluations, best = results.evaluations(), results.best()
    played = [index for index in evaluations if index >= 0]
    if best is None or -1 not in evaluations or not played:
        return None
    return best.iteration if best.iteration >= 0 else played[-1]


def tiles(results: Results) -> list[Tile]:
    index = headline_index(results)
    if index is None:
        return []
    evaluations, found = results.evaluations(), []
    for metric, name, unit, sign in GUARDS:
        if metric not in evaluations[index]:
            continue
        change, error = results.paired_difference(metric, -1, index)
        half = Z95 * error
        is_seen = abs(change) > max(half, FLAT)
        verdict = "no difference shown" if not is_seen else "better" if sign * change > 0 else "worse"
        start, value = (readable(metric, evaluations[i][metric]) for i in (-1, index))
        words = f"{100 * change:+.1f} ± {100 * half:.1f} points" if metric in SHARES else f"{change:+.4f} ± {half:.4f}"
        found.append(Tile(name, unit, start, value, words.replace(" ", "\u00a0"), verdict))
    return found


def readable(metric: str, value: float) -> str:
    if metric in SHARES:
        return f"{value:.1%}".replace("%", "\u00a0%")
    return f"{value:.4f}" if metric == "held_out_nll" else f"{value:.1f}"
