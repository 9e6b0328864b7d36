"""Warnings about a run. Each is a fixed rule with its numbers, so the absence of a warning is informative too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import log
from typing import Any

import numpy as np
from jaxtyping import Float

from sparring.report.summary import format_change
from sparring.run.examples import join, read_iteration
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed, read_manifest
from sparring.run.results import Results
from sparring.types import Generation, Rendered

LENGTH_RATIO, LENGTH_DRIFT, END_RATE, REPETITION, SHORTCUT = 1.5, 1.1, 0.2, 0.1, 0.75
"""Thresholds."""
MAX_ROWS, COMMON_TOKENS, FOLDS = 1000, 16, 5
"""Of the shortcut classifier: rows, first and last tokens with a feature of their own, and folds."""


def find_warnings(results: Results) -> list[str]:
    """Sentences, the most serious first."""
    evaluations = results.evaluations()
    done = [index for index in evaluations if index >= 0]
    warnings = evaluation_warnings(results, done[-1]) if -1 in evaluations and done else []
    for index in range(results.recipe.iterations):
        scored = results.run.stage(index, "score")
        info: dict[str, Any] = dict(read_manifest(scored).info) if is_committed(scored) else {}
        if "engine_difference" in info and not info["engine_difference"] <= info["engine_allowed"]:
            warnings.append(
                f"The engine samples from a different model in iteration {index}: its log-probs of "
                f"{info['engine_answers']} responses differ from the scorer's by {info['engine_difference']:.2g} nats "
                f"per token, and rounding explains at most {info['engine_allowed']:g}. Check the weights, adapter and "
                "precision that it serves."
            )
        accuracy = shortcut_accuracy(results, index)
        if accuracy is not None and accuracy > SHORTCUT:
            warnings.append(
                f"Iteration {index} has a shortcut: length, first and last token alone classify {accuracy:.0%} of "
                "real and generated responses correctly (chance is 50%), so the policy can win without better "
                "responses."
            )
    return warnings


def evaluation_warnings(results: Results, index: int) -> list[str]:
    """Compares the evaluation of the last iteration, `index`, to that of the starting model.

    The game pulls the form of responses towards the real ones, so a change towards them is no warning.
    """
    evaluations = results.evaluations()
    start, last = evaluations[-1], evaluations[index]
    warnings: list[str] = []
    change = results.change("held_out_nll", -1, index)
    if change.sign > 0:
        warnings.append(
            f"The likelihood of real responses falls: from the start to iteration {index} the held-out NLL rises by "
            f"{format_change('held_out_nll', change)} nats per token. Try a lower learning rate or fewer iterations."
        )
    if drifts_from_real(start["length_ratio"], last["length_ratio"]) and results.change("length", -1, index).sign:
        warnings.append(
            f"The response length drifts away from that of the real responses: after iteration {index} responses have "
            f"{last['length_ratio']:.0%} of it ({last['length']:.0f} tokens on average), at the start "
            f"{start['length_ratio']:.0%} ({start['length']:.0f})."
        )
    if last["end_rate"] < min(start["end_rate"], last["real_end_rate"]) - END_RATE:
        warnings.append(
            f"The model stops emitting its end token: {last['end_rate']:.0%} of its responses end, compared to "
            f"{start['end_rate']:.0%} at the start and {last['real_end_rate']:.0%} of the real responses."
        )
    if last["repetition"] > max(start["repetition"], last["real_repetition"]) + REPETITION:
        warnings.append(
            f"Responses repeat themselves: {last['repetition']:.0%} of their 4-grams are repeats, compared to "
            f"{start['repetition']:.0%} at the start and {last['real_repetition']:.0%} in the real responses."
        )
    return warnings


def drifts_from_real(start: float, last: float) -> bool:
    """Whether responses are far from the real ones in length, and farther than at the start, by their length_ratio."""
    before, after = (abs(log(max(ratio, 1e-9))) for ratio in (start, last))
    return after > log(LENGTH_RATIO) and after > before + log(LENGTH_DRIFT)


def shortcut_accuracy(results: Results, index: int) -> float | None:
    """Held-out accuracy of a classifier that sees only the form of a response, real or generated."""
    folder = results.run.stage(index, "generate")
    if not is_committed(folder) or results.data is None:
        return None
    iteration = Iteration(results.run, results.recipe.at(index), index)
    joined = join(iteration.train_rows()[:MAX_ROWS], {index: read_iteration(iteration, index)})
    pairs = [(row.row, row.generated[index][0]) for row in joined]
    return classify_by_form(pairs) if len(pairs) >= 2 * FOLDS else None


def classify_by_form(pairs: Sequence[tuple[Rendered, Generation]]) -> float:
    """Cross-validated accuracy of a logistic regression. Both responses of a prompt are in the same fold."""
    forms = [(len(r.real_ids), r.real_finish == "stop", int(r.real_ids[0]), int(r.real_ids[-1])) for r, _ in pairs]
    forms += [(len(g.token_ids), g.finish == "stop", int(g.token_ids[0]), int(g.token_ids[-1])) for _, g in pairs]
    tokens = [[form[place] for form in forms] for place in (2, 3)]  # first ones, last ones
    common = [[token for token, _ in Counter(seen).most_common(COMMON_TOKENS)] for seen in tokens]
    lengths = np.log([form[0] for form in forms])
    lengths = (lengths - lengths.mean()) / (lengths.std() + 1e-9)
    features = np.column_stack(
        [np.ones(len(forms)), lengths, lengths**2, [form[1] for form in forms]]
        + [[one == token for one in seen] for seen, known in zip(tokens, common, strict=True) for token in known]
    ).astype(np.float64)
    is_real = np.repeat([1.0, 0.0], len(pairs))
    fold = np.tile(np.arange(len(pairs)) % FOLDS, 2)
    accuracies = []
    for k in range(FOLDS):
        weights = logistic_regression(features[fold != k], is_real[fold != k])
        accuracies.append(((features[fold == k] @ weights > 0) == is_real[fold == k]).mean())
    return float(np.mean(accuracies))


def logistic_regression(
    features: Float[np.ndarray, "rows columns"], labels: Float[np.ndarray, " rows"]
) -> Float[np.ndarray, " columns"]:
    """Newton's method with a ridge penalty, which keeps the weights finite when the classes are separable."""
    weights = np.zeros(features.shape[1])
    ridge = np.eye(features.shape[1])
    for _ in range(8):
        probability = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        gradient = features.T @ (probability - labels) + weights
        curvature = (features * (probability * (1 - probability))[:, None]).T @ features + ridge
        weights -= np.linalg.solve(curvature, gradient)
    return weights
