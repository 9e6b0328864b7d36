"""Stacked bars as plain markup, readable on a phone: reward against likelihood, and where the time went."""

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
QUADRANT_COLORS = ("real", "generated", "fifth", "proto", "rest")

STAGES = (
    ("generate", "generated"),
    ("score", "proto"),
    ("train", "real"),
    ("evaluate", "rest"),
    ("benchmarks", "fifth"),
)
TRAINING_PARTS = (("forward and backward", "real"), ("update", "fifth"), ("loading, checkpoints, saving", "rest"))


@dataclass(frozen=True)
class Bars:
    title: str
    caption: str
    legend: Sequence[tuple[str, str]]  # label, color: a variable of style.css
    rows: Sequence[tuple[str, Sequence[float], str]]  # label, a value per part, the text after the bar
    full: float  # the value that fills the width


def quadrant_bars(results: Results) -> Bars | None:
    evaluations = {i: m for i, m in results.evaluations().items() if QUADRANTS[0][0] in m}
    if not evaluations:
        return None
    legend = [(heading, color) for (_, heading), color in zip(QUADRANTS, QUADRANT_COLORS, strict=True)]
    rows = []
    for index, metrics in evaluations.items():
        won = f"{metrics['rewards/accuracies']:.1%} won"
        rows.append((f"iteration {index}", [metrics[key] for key, _ in QUADRANTS], won))
    caption = (
        "Held-out rows by whether the real response has the higher reward, and the higher likelihood, than the "
        "opponent's. A higher reward with a lower likelihood does not improve generation."
    )
    return Bars("Reward against likelihood", caption, legend, rows, 1.0)


def time_bars(results: Results) -> list[Bars]:
    """Seconds of every finished stage, and how training spent them."""
    seconds: dict[int, dict[str, float]] = {}
    for stage in results.stages():
        if stage.seconds is not None:
            of_iteration, name = seconds.setdefault(stage.iteration, {}), stage.stage.partition("/")[0]
            of_iteration[name] = of_iteration.get(name, 0.0) + stage.seconds
    if not seconds:
        return []
    legend = [(name, color) for name, color in STAGES if any(name in stages for stages in seconds.values())]
    rows = [
        (
            "start" if index < 0 else f"iteration {index}",
            [stages.get(name, 0.0) for name, _ in legend],
            format_duration(sum(stages.values())),
        )
        for index, stages in seconds.items()
    ]
    charts = [Bars("By stage", describe_time(results, seconds), legend, rows, max(sum(row[1]) for row in rows))]
    parts = {i: split_training(results, i, stages["train"]) for i, stages in seconds.items() if "train" in stages}
    if parts:
        rows = [(f"iteration {index}", values, format_duration(sum(values))) for index, values in parts.items()]
        caption = (
            "Forward and backward passes; the update, which clips the gradient and runs the optimizer step (on a GPU "
            "its last part overlaps the next step); and everything outside of steps: loading, checkpoints, saving."
        )
        charts.append(Bars("Within training", caption, TRAINING_PARTS, rows, max(sum(row[1]) for row in rows)))
    return charts


def split_training(results: Results, index: int, total: float) -> Sequence[float]:
    """Seconds of each of TRAINING_PARTS."""
    steps = results.training(index)
    update = sum(step["update_seconds"] for step in steps)
    in_steps = sum(step["seconds"] for step in steps)
    return in_steps - update, update, max(0.0, total - in_steps)


def describe_time(results: Results, seconds: dict[int, dict[str, float]]) -> str:
    """The total time, each stage's share, and the throughput of generation and training."""
    totals = {name: sum(stages.get(name, 0.0) for stages in seconds.values()) for name, _ in STAGES}
    total = sum(totals.values())
    shares = ", ".join(f"{name} {value / total:.0%}" for name, value in totals.items() if value)
    text = f"{format_duration(total)} in total: {shares}."
    folders = [results.run.stage(index, "generate") for index in seconds if index >= 0]
    generated = sum(int(str(read_manifest(folder).info["tokens"])) for folder in folders if is_committed(folder))
    if generated:
        text += f" Generation: {generated / totals['generate']:,.0f} tokens per second."
    trained = sum(step["num_tokens"] for i in seconds if "train" in seconds[i] for step in results.training(i))
    return text + (f" Training: {trained / totals['train']:,.0f} tokens per second." if trained else "")


def format_duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"
