"""Plays the demo's task over several seeds and learning rates, for README.md and docs/results.md.

    python benchmarks/demo_seeds.py FOLDER --seeds 6        writes benchmarks/results/demo_seeds.json

Each seed has its own problems and starting model. Every method is played at every learning rate. Differences are paired
by seed; intervals are 95 %, Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
from page import interval

from sparring.commands.demo import GAME, ITERATIONS, METHODS, START, demo_recipe, write_task
from sparring.loop import play
from sparring.run.results import Results

METRICS = ("held_out_nll", "greedy_accuracy", "sampled_accuracy")
RATES = (3e-5, 1e-4, 3e-4)

Found = dict[tuple[str, float], dict[int, list[dict[str, float]]]]
"""(method, rate) -> iteration -> metrics of each seed."""


def play_seed(folder: Path, seed: int, found: Found) -> None:
    write_task(folder / "task", seed)
    recipe = demo_recipe(folder, folder / "task" / "model", "sft", seed, iterations=1, train=START)
    start = play(recipe, folder / "start").run
    for method in METHODS:
        for rate in RATES:
            settings = {**GAME, "learning_rate": rate}
            recipe = demo_recipe(folder, start.model(0), method, seed, iterations=ITERATIONS, train=settings)
            run = play(recipe, folder / f"{method}-{rate:g}").run
            for iteration, metrics in Results(run.root).evaluations().items():
                found.setdefault((method, rate), {}).setdefault(iteration, []).append(metrics)


def summarise(found: Found) -> dict[str, object]:
    def values(method: str, rate: float, iteration: int, metric: str) -> np.ndarray:
        return np.array([metrics[metric] for metrics in found[method, rate][iteration]])

    last = ITERATIONS - 1
    arms: dict[str, object] = {}
    for method, rate in found:
        best_sft = np.min([values("sft", r, t, "held_out_nll") for r in RATES for t in range(ITERATIONS)], axis=0)
        arms[f"{method}, {rate:g}"] = {
            "by_iteration": {
                metric: {
                    "start" if t < 0 else str(t): interval(values(method, rate, t, metric))
                    for t in range(-1, ITERATIONS)
                }
                for metric in METRICS
            },
            "last_minus_start": {
                m: interval(values(method, rate, last, m) - values(method, rate, -1, m)) for m in METRICS
            },
            "last_minus_last_of_sft": {
                m: interval(values(method, rate, last, m) - values("sft", rate, last, m)) for m in METRICS
            },
            "last_nll_minus_best_of_sft": interval(values(method, rate, last, "held_out_nll") - best_sft),
        }
    return arms


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if platform.system() == "Linux" else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=6)
    arguments = parser.parse_args()
    found: Found = {}
    for seed in range(arguments.seeds):
        play_seed(arguments.folder / f"seed-{seed}", seed, found)
    result = {
        "what": f"the demo's task, seeds 0 to {arguments.seeds - 1}, every method with every learning rate",
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}, one thread",
        "versions": {name: version(name) for name in ("sparring", "torch", "transformers")},
        "arms": summarise(found),
    }
    target = Path(__file__).parent / "results" / "demo_seeds.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
