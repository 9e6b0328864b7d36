"""What to worry about, in words: each alarm a rule with its numbers, so that silence means something too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sparring.run.examples import join, read_iteration
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed, read_manifest
from sparring.run.results import Results
from sparring.types import Generation, Rendered

LENGTH_RATIO, END_RATE, REPETITION, SHORTCUT = 1.5, 0.2, 0.1, 0.75
MAX_ROWS, FIRST_TOKENS, FOLDS = 1000, 16, 5


def alarms(results: Results) -> list[str]:
    """Sentences, the gravest first."""
    evaluations = results.evaluations()
    played = [index for index in evaluations if index >= 0]
    found: list[str] = []
    if -1 in evaluations and played:
        start, last = evaluations[-1], evaluations[played[-1]]
        change, error = results.paired_difference("held_out_nll", -1, played[-1])
        if change > 2 * error:
            found.append(
                f"The likelihood of real answers falls: held-out NLL is {change:.3f} ± {error:.3f} nats per token "
                f"above the start's after iteration {played[-1]}. A lower rate, or fewer iterations, may help."
            )
        grown = last["length_ratio"] / max(start["length_ratio"], 1e-9)
        if not 1 / LENGTH_RATIO < grown < LENGTH_RATIO:
            found.append(
                f"Lengths run away: answers have {last['length']:.0f} tokens on average, {start['length']:.0f} at the "
                "start."
            )
        if last["end_rate"] < start["end_rate"] - END_RATE:
            found.append(
                f"The model forgets to stop: {last['end_rate']:.0%} of its answers end, {start['end_rate']:.0%} did."
            )
        if last["repetition"] > start["repetition"] + REPETITION:
            found.append(
                f"Answers repeat themselves: {last['repetition']:.0%} of their 4-grams, {start['repetition']:.0%} at "
                "the start."
            )
    for index in range(results.recipe.iterations):
        scored = results.run.stage(index, "score")
        info: dict[str, Any] = dict(read_manifest(scored).info) if is_committed(scored) else {}
        if "engine_difference" in info and not info["engine_difference"] <= info["engine_allowed"]:
            found.append(
                f"The engine draws from another model in iteration {index}: its log-probs of {info['engine_answers']} "
                f"answers are {info['engine_difference']:.2g} nats per token away from the scorer's; rounding explains "
                f"{info['engine_allowed']:g}. Look at what it serves: weights, adapter, precision."
            )
        share = shortcut(results, index)
        if share is not None and share > SHORTCUT:
            found.append(
                f"A shortcut is open in iteration {index}: length, end token and first token alone tell {share:.0%} of "
                "real and generated answers apart (50 % is chance), so the game can be won without better answers."
            )
    return found


def shortcut(results: Results, index: int) -> float | None:
    """How often a logistic regression on form alone tells real from generated, on rows that it was not fitted to."""
    folder = results.run.stage(index, "generate")
    if not is_committed(folder) or results.data is None:
        return None
    iteration = Iteration(results.run, results.recipe.at(index), index)
    joined = join(iteration.train_rows()[:MAX_ROWS], {index: read_iteration(iteration, index)})
    pairs = [(one.row, one.generated[index][0]) for one in joined]
    return classify_by_form(pairs) if len(pairs) >= 2 * FOLDS else None


def classify_by_form(pairs: Sequence[tuple[Rendered, Generation]]) -> float:
    """Share of right guesses in cross-validation; both answers of a prompt are in one fold."""
    forms = [(len(r.real_ids), r.real_finish == "stop", int(r.real_ids[0])) for r, _ in pairs]
    forms += [(len(g.token_ids), g.finish == "stop", int(g.token_ids[0])) for _, g in pairs]
    common = [token for token, _ in Counter(first for _, _, first in forms).most_common(FIRST_TOKENS)]
    lengths = np.log([length for length, _, _ in forms])
    lengths = (lengths - lengths.mean()) / (lengths.std() + 1e-9)
    features = np.column_stack(
        [np.ones(len(forms)), lengths, lengths**2, [ends for _, ends, _ in forms]]
        + [[first == token for _, _, first in forms] for token in common]
    ).astype(np.float64)
    is_real = np.repeat([1.0, 0.0], len(pairs))
    fold = np.tile(np.arange(len(pairs)) % FOLDS, 2)
    right = []
    for k in range(FOLDS):
        weights = logistic_regression(features[fold != k], is_real[fold != k])
        right.append(((features[fold == k] @ weights > 0) == is_real[fold == k]).mean())
    return float(np.mean(right))


def logistic_regression(
    features: Float[np.ndarray, "rows columns"], labels: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " columns"]:
    """Newton's method with a small ridge, which keeps separable rows finite."""
    weights = np.zeros(features.shape[1])
    ridge = np.eye(features.shape[1])
    for _ in range(8):
        probability = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        gradient = features.T @ (probability - labels) + weights
        curvature = (features * (probability * (1 - probability))[:, None]).T @ features + ridge
        weights -= np.linalg.solve(curvature, gradient)
    return weights
