"""Bars of shares as plain markup: they stay readable on a phone. Quadrants, and where the time went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparring.run.manifest import is_committed, read_manifest
from sparring.run.results import Results

QUADRANTS = (
    ("quadrants/higher_reward_higher_likelihood", "higher reward, higher likelihood"),
    ("quadrants/higher_reward_lower_likelihood", "higher reward, lower likelihood"),
    ("quadrants/lower_reward_higher_likelihood", "lower reward, higher likelihood"),
    ("quadrants/lower_reward_lower_likelihood", "lower reward, lower likelihood"),
    ("quadrants/ties", "ties"),
)
QUADRANT_COLOURS = ("real", "generated", "fifth", "proto", "rest")

STAGES = (
    ("generate", "generated"),
    ("score", "proto"),
    ("train", "real"),
    ("evaluate", "rest"),
    ("benchmarks", "fifth"),
)
WITHIN = (("forward and backward", "real"), ("update", "fifth"), ("loading, checkpoints, saving", "rest"))


@dataclass(frozen=True)
class Bars:
    title: str
    caption: str
    legend: Sequence[tuple[str, str]]  # label, colour: a variable of style.css
    rows: Sequence[tuple[str, Sequence[float], str]]  # label, a value per part, the row in words at its end
    full: float  # the value that fills the width


def quadrant_bars(results: Results) -> Bars | None:
    evaluations = {i: m for i, m in results.evaluations().items() if QUADRANTS[0][0] in m}
    if not evaluations:
        return None
    legend = [(heading, colour) for (_, heading), colour in zip(QUADRANTS, QUADRANT_COLOURS, strict=True)]
    rows = []
    for index, metrics in evaluations.items():
        won = metrics[QUADRANTS[0][0]] + metrics[QUADRANTS[1][0]]
        rows.append((f"iteration {index}", [metrics[key] for key, _ in QUADRANTS], f"{100 * won:.1f} % won"))
    caption = (
        "Held-out rows by whether the real answer has the higher reward, and the higher likelihood, than the "
        "opponent's. Higher reward with lower likelihood is a reward that does not help generation."
    )
    return Bars("Reward against likelihood", caption, legend, rows, 1.0)


def time_bars(results: Results) -> list[Bars]:
    """Seconds of every stage that is done, and what training spent them on."""
    spent: dict[int, dict[str, float]] = {}
    for stage in results.stages():
        if stage.seconds is not None:
            seconds, name = spent.setdefault(stage.iteration, {}), stage.stage.partition("/")[0]
            seconds[name] = seconds.get(name, 0.0) + stage.seconds
    if not spent:
        return []
    used = [(name, colour) for name, colour in STAGES if any(name in seconds for seconds in spent.values())]
    rows = [
        (
            "start" if index < 0 else f"iteration {index}",
            [seconds.get(name, 0.0) for name, _ in used],
            duration(sum(seconds.values())),
        )
        for index, seconds in spent.items()
    ]
    found = [Bars("By stage", describe(results, spent), used, rows, max(sum(row[1]) for row in rows))]
    within = {
        index: parts
        for index, seconds in spent.items()
        if "train" in seconds and (parts := within_training(results, index, seconds["train"])) is not None
    }
    if within:
        rows = [(f"iteration {index}", parts, duration(sum(parts))) for index, parts in within.items()]
        caption = (
            "Forward and backward passes; the update, which clips the gradient and takes the optimizer's step (on a "
            "GPU its last part overlaps the next step); and what is not in a step: loading, checkpoints, saving."
        )
        found.append(Bars("Within training", caption, WITHIN, rows, max(sum(row[1]) for row in rows)))
    return found


def within_training(results: Results, index: int, whole: float) -> Sequence[float] | None:
    """Seconds of WITHIN, in its order; None where the steps did not count them apart."""
    steps = results.training(index)
    if not steps or "update_seconds" not in steps[0]:
        return None
    update = sum(step["update_seconds"] for step in steps)
    in_steps = sum(step["seconds"] for step in steps)
    return in_steps - update, update, max(0.0, whole - in_steps)


def describe(results: Results, spent: dict[int, dict[str, float]]) -> str:
    """The whole time, the share of each stage, and how fast the two long ones were."""
    totals = {name: sum(seconds.get(name, 0.0) for seconds in spent.values()) for name, _ in STAGES}
    whole = sum(totals.values())
    shares = ", ".join(f"{name} {100 * seconds / whole:.0f} %" for name, seconds in totals.items() if seconds)
    text = f"{duration(whole)} in all: {shares}."
    folders = [results.run.stage(index, "generate") for index in spent if index >= 0]
    drawn = sum(int(str(read_manifest(folder).info["tokens"])) for folder in folders if is_committed(folder))
    if drawn:
        text += f" Generation drew {drawn / totals['generate']:,.0f} tokens per second."
    trained = sum(step["num_tokens"] for i in spent if "train" in spent[i] for step in results.training(i))
    return text + (f" Training computed {trained / totals['train']:,.0f} tokens per second." if trained else "")


def duration(seconds: float) -> str:
    """As a person reads it: seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
