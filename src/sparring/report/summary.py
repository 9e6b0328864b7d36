"""What a reader sees first: a few sentences about the run, and the headline numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparring.report.figures import Z95
from sparring.run.manifest import is_committed, read_manifest
from sparring.run.results import FLAT, Results

METRICS = (
    ("held_out_nll", "held-out NLL", "nats per token of the real responses; lower is better"),
    ("greedy_accuracy", "greedy accuracy", "fraction of correct responses, greedy decoding"),
    ("sampled_accuracy", "sampled accuracy", "fraction of correct responses, one sample per prompt"),
    (
        "rewards/accuracies",
        "won",
        "fraction of rows whose real response has the higher reward; 0.5 at equilibrium without ties",
    ),
    ("rewards/ties", "tied", "fraction of rows whose two responses have the same reward"),
    ("rewards/margins", "reward margin", "reward of the real response minus that of the opponent's"),
    ("advantages/current", "current advantage", "log p(real) - log p(opponent's response), nats"),
    ("advantages/history_logps", "historical advantage", "log p(opponent's) - log p(starting model's response), nats"),
    ("kl_from_opponent", "KL from opponent", "nats per response"),
    ("kl_from_start", "KL from start", "nats per response"),
    ("entropy", "entropy", "nats per token of the policy's own samples"),
    ("length", "response length", "mean tokens"),
    ("length_ratio", "length / real", "mean length divided by that of the real responses"),
    ("end_rate", "ended", "fraction of responses with an end token"),
    ("distinct_2", "distinct-2", "distinct token pairs divided by all pairs"),
    ("repetition", "repetition", "fraction of 4-grams that repeat within a response"),
    ("copy_rate", "copies", "fraction of responses equal to the real one"),
)
"""Metric, its heading, and its meaning."""

NAMES = {metric: heading for metric, heading, _ in METRICS}

HEADLINES = (
    ("held_out_nll", "nats per token of the real responses", -1),
    ("greedy_accuracy", "correct responses, greedy decoding", 1),
    ("sampled_accuracy", "correct responses, one sample per prompt", 1),
)
"""Metric, unit, and the sign of an improvement."""

PERCENTAGES = ("greedy_accuracy", "sampled_accuracy", "rewards/accuracies", "end_rate", "repetition")
"""Metrics that are shown in percent."""


@dataclass(frozen=True)
class HeadlineCard:
    name: str
    unit: str
    start: str
    value: str
    change: str  # with half of its 95% interval, paired over rows
    verdict: Literal["better", "worse", "no difference shown"]


def summary(results: Results) -> str:
    if results.data is None:
        return "The run has not read its data yet."
    evaluations, best = results.evaluations(), results.best()
    done = [index for index in evaluations if index >= 0]
    text = (
        f"{results.recipe.method.name} completed {len(done)} of {results.recipe.iterations} iterations on "
        f"{results.data.num_train:,} prompts. "
    )
    if results.stopped:
        text += f"The run stopped early, after iteration {results.stopped[0]}: {results.stopped[1]}. "
    if best is None or -1 not in evaluations or not done:
        return text + "There is nothing to compare yet."
    name, start = NAMES[best.metric], evaluations[-1][best.metric]
    last = evaluations[done[-1]][best.metric]
    if best.iteration < 0:
        return (
            text + f"No iteration improves the {name} of the starting model: {start:.4f} at the start, {last:.4f} "
            f"after iteration {done[-1]}."
        )
    change, error = results.paired_difference(best.metric, -1, best.iteration)
    text += (
        f"Iteration {best.iteration} has the best {name}: {best.value:.4f}, compared to {start:.4f} at the start, a "
        f"change of {change:+.4f} ± {Z95 * error:.4f} (95% interval, paired over the held-out rows). "
    )
    if abs(change) < Z95 * error:
        text += "The interval contains zero, so this may be chance: evaluate on more held-out rows. "
    if best.iteration != done[-1]:
        text += f"The metric got worse afterwards, to {last:.4f}. "
    return text


def warning_summary(warnings: Sequence[str]) -> str:
    """One sentence with the first clause of each warning."""
    if not warnings:
        return "There are no warnings."
    clauses = list(dict.fromkeys(warning.partition(":")[0] for warning in warnings))
    return f"Warnings: {'; '.join(clause[0].lower() + clause[1:] for clause in clauses)}."


def headline_index(results: Results) -> int | None:
    """The iteration that the headline shows: the best one, or the last if none beats the start."""
    evaluations, best = results.evaluations(), results.best()
    done = [index for index in evaluations if index >= 0]
    if best is None or -1 not in evaluations or not done:
        return None
    return best.iteration if best.iteration >= 0 else done[-1]


def headline_cards(results: Results) -> list[HeadlineCard]:
    index = headline_index(results)
    if index is None:
        return []
    evaluations, cards = results.evaluations(), []
    for metric, unit, sign in HEADLINES:
        if metric not in evaluations[index]:
            continue
        change, error = results.paired_difference(metric, -1, index)
        half = Z95 * error
        is_significant = abs(change) > max(half, FLAT)
        verdict = "no difference shown" if not is_significant else "better" if sign * change > 0 else "worse"
        start, value = (format_metric(metric, evaluations[i][metric]) for i in (-1, index))
        text = (
            f"{100 * change:+.1f} ± {100 * half:.1f} points" if metric in PERCENTAGES else f"{change:+.4f} ± {half:.4f}"
        )
        cards.append(HeadlineCard(NAMES[metric], unit, start, value, text.replace(" ", "\u00a0"), verdict))
    return cards


def format_metric(metric: str, value: float) -> str:
    if metric in PERCENTAGES:
        return f"{value:.1%}"
    return f"{value:.4f}" if metric == "held_out_nll" else f"{value:.1f}"


def scoring_noise(results: Results) -> str:
    """How much rounding the opponent's cached log-probs carry, in the last iteration that was scored; may be empty."""
    scored = [i.stage("score") for i in results.iterations if i.index >= 0 and is_committed(i.stage("score"))]
    if not scored:
        return ""
    info: dict[str, Any] = dict(read_manifest(scored[-1]).info)
    return (
        f" The opponent's cached log-probs carry rounding of {info['noise_per_response']:.2g} nats per response "
        f"({info['noise_per_token']:.2g} per token): {info['noise_responses']} of them, scored again alone."
    )
