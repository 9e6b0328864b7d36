"""What was played and what came of it, in a few sentences that do not oversell."""

from __future__ import annotations

from collections.abc import Sequence

from sparring.report.figures import Z95
from sparring.run.results import Results

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
    if results.stopped:
        text += f"It stopped by itself after iteration {results.stopped[0]}: {results.stopped[1]}. "
    if best is None or -1 not in evaluations or not played:
        return text + "There is nothing to compare yet."
    name, start = NAMES[best.metric], evaluations[-1][best.metric]
    last = evaluations[played[-1]][best.metric]
    if best.iteration < 0:
        return text + f"No iteration beats the starting model by {name}: {start:.4f} at first, {last:.4f} at last."
    change, error = results.paired_difference(best.metric, -1, best.iteration)
    text += (
        f"The best by {name} is iteration {best.iteration}: {best.value:.4f}, from {start:.4f} at the start, "
        f"a change of {change:+.4f} ± {Z95 * error:.4f} (95 % interval, paired over the held-out rows). "
    )
    if abs(change) < Z95 * error:
        text += "The interval contains no change: more held-out rows are needed to tell it from chance. "
    if best.iteration != played[-1]:
        text += f"After it the metric got worse again, to {last:.4f}. "
    return text


def worries(alarms: Sequence[str]) -> str:
    """One sentence; the alarms say the rest."""
    if not alarms:
        return "None of the signs that are watched is alarming."
    heads = list(dict.fromkeys(alarm.partition(":")[0] for alarm in alarms))
    return f"To worry about: {'; '.join(head[0].lower() + head[1:] for head in heads)}."
