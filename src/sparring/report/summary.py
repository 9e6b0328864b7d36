"""What a reader sees first: a few sentences about the run, and the headline numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sparring.run.estimate import Estimate
from sparring.run.manifest import is_committed, read_manifest
from sparring.run.results import Headline, Results, name_methods

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
    change: str  # with its 95% interval
    verdict: Literal["better", "worse", "no difference shown"]


def summary(results: Results) -> str:
    if results.data is None:
        return "The run has not read its data yet."
    done = [index for index in results.evaluations() if index >= 0]
    text = (
        f"{name_methods(results.recipe)} completed {len(done)} of {results.recipe.iterations} iterations on "
        f"{results.data.num_train:,} prompts. "
    )
    if results.stopped:
        text += f"The run stopped early, after iteration {results.stopped[0]}: {results.stopped[1]}. "
    headline = results.headline()
    return text + (describe_headline(headline) if headline else "There is nothing to compare yet.")


def describe_headline(headline: Headline) -> str:
    """The best iteration, and how the one of the headline differs from the start on prompts that did not choose."""
    metric, name = headline.chosen_by, NAMES[headline.chosen_by]
    start, value, change = (by_metric[metric] for by_metric in (headline.start, headline.value, headline.change))
    if headline.choosing_prompts is None:
        chosen, judged = "", f"on {value.clusters} held-out prompt{'s' if value.clusters > 1 else ''}"
    else:
        plural = "s" if headline.choosing_prompts > 1 else ""
        chosen = f" on {headline.choosing_prompts} held-out prompt{plural}"
        judged = f"on the other {value.clusters}"
    before, after = format_metric(metric, start.mean), format_metric(metric, value.mean)
    if headline.best == headline.iteration:
        text = f"Iteration {headline.best} has the best {name}{chosen}{', and' if chosen else ':'}"
    elif headline.best < 0:
        text = f"No iteration improves the {name} of the starting model{chosen}. Iteration {headline.iteration} has"
    else:
        text = f"Iteration {headline.best} has the best {name}{chosen}. Iteration {headline.iteration} has"
    text += f" {after} {judged}, compared to {before} at the start, a change of {format_change(metric, change)}."
    if change.low is None:
        return text + " One prompt has no interval: hold out more."
    return text if change.sign else text + " This may be chance: hold out more prompts."


def warning_summary(warnings: Sequence[str]) -> str:
    """One sentence with the first clause of each warning."""
    if not warnings:
        return "There are no warnings."
    clauses = list(dict.fromkeys(warning.partition(":")[0] for warning in warnings))
    return f"Warnings: {'; '.join(clause[0].lower() + clause[1:] for clause in clauses)}."


def headline_cards(results: Results) -> list[HeadlineCard]:
    headline, cards = results.headline(), []
    if headline is None:
        return []
    for metric, unit, sign in HEADLINES:
        if metric not in headline.change:
            continue
        change = headline.change[metric]
        verdict = "no difference shown" if not change.sign else "better" if change.sign == sign else "worse"
        start, value = (format_metric(metric, values[metric].mean) for values in (headline.start, headline.value))
        text = format_change(metric, change).replace(" ", "\u00a0")
        cards.append(HeadlineCard(NAMES[metric], unit, start, value, text, verdict))
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
    if "noise_per_response" not in info:
        return ""  # a teacher's
    return (
        f" The opponent's cached log-probs carry rounding of {info['noise_per_response']:.2g} nats per response "
        f"({info['noise_per_token']:.2g} per token): {info['noise_responses']} of them, scored again alone."
    )


def format_change(metric: str, change: Estimate) -> str:
    """A change with its 95% interval in brackets, such as "-0.0123 [-0.0210, -0.0036]"."""
    scale, digits, unit = (100, 1, " points") if metric in PERCENTAGES else (1, 4, "")
    text = f"{scale * change.mean:+.{digits}f}"
    if change.low is not None and change.high is not None:
        text += f" [{scale * change.low:+.{digits}f}, {scale * change.high:+.{digits}f}]"
    return text + unit


def format_value(metric: str, metrics: Mapping[str, float]) -> str:
    """A metric of metrics.json, with its 95% interval in brackets if it has one."""
    text = format_metric(metric, metrics[metric])
    if f"{metric}_low" not in metrics:
        return text
    low, high = (format_metric(metric, metrics[f"{metric}_{end}"]).removesuffix("%") for end in ("low", "high"))
    return f"{text} [{low}, {high}]"
