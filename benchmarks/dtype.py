"""Whether bfloat16 changes what is learned: the demo's games in both dtypes, from the same start, over seeds.

    python benchmarks/dtype.py FOLDER --seeds 3        writes benchmarks/results/dtype.json

Differences are paired by seed, bfloat16 minus float32; intervals are 95 %, Student's t over seeds. Beside them what one
dtype differs by when nothing but the seed of the run changes, which is what chance does.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
from demo_seeds import METRICS, T, cpu_name

from sparring.commands.demo import GAME, START, demo_recipe, write_task
from sparring.loop import play
from sparring.recipe.hardware import has_bfloat16_products
from sparring.run.results import Results

ARMS = {"float32": ("float32", 0), "bfloat16": ("bfloat16", 0), "float32, another seed": ("float32", 1000)}
ITERATIONS = 2


def play_seed(folder: Path, method: str, seed: int) -> dict[str, dict[str, float]]:
    write_task(folder / "task", seed)
    recipe = demo_recipe(folder, folder / "task" / "model", "sft", seed, iterations=1, train=START)
    start = play(recipe, folder / "start")
    found = {}
    for arm, (dtype, more) in ARMS.items():
        recipe = demo_recipe(
            folder, start.model(0), method, seed + more, iterations=ITERATIONS, train={**GAME, "dtype": dtype}
        )
        run = play(recipe, folder / f"{method}-{dtype}-{more}")
        found[arm] = dict(Results(run.root).evaluations()[ITERATIONS - 1])
    return found


def interval(values: list[float]) -> dict[str, float]:
    spread = (
        T[len(values) - 1] * float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    )
    return {"mean": round(float(np.mean(values)), 5), "half_width": round(spread, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", default="spin")
    arguments = parser.parse_args()
    found = [play_seed(arguments.folder / f"seed-{s}", arguments.method, s) for s in range(arguments.seeds)]
    result = {
        "what": f"the demo's task, {arguments.method}, {ITERATIONS} iterations, seeds 0 to {arguments.seeds - 1}",
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, bfloat16 products: {has_bfloat16_products()}",
        "versions": {name: version(name) for name in ("sparring", "torch", "transformers")},
        "values": {arm: {m: [round(f[arm][m], 5) for f in found] for m in METRICS} for arm in ARMS},
        "minus_float32": {
            arm: {m: interval([f[arm][m] - f["float32"][m] for f in found]) for m in METRICS}
            for arm in ARMS
            if arm != "float32"
        },
    }
    target = Path(__file__).parent / "results" / "dtype.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
