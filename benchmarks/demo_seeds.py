"""What the README says about the demo, over several seeds: each has other problems and another model.

    python benchmarks/demo_seeds.py FOLDER --seeds 5        writes benchmarks/results/demo_seeds.json

Differences are paired by seed; intervals are 95 %, by Student's t over seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from sparring.demo import METHODS, play_demo
from sparring.results import Results

METRICS = ("held_out_nll", "greedy_accuracy", "sampled_accuracy")
# quantiles of Student's t at 97.5 %, by degrees of freedom
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def interval(values: np.ndarray) -> dict[str, object]:
    half = T[len(values) - 1] * values.std(ddof=1) / np.sqrt(len(values))
    return {
        "mean": round(float(values.mean()), 4),
        "half_width_95": round(float(half), 4),
        "seeds": values.round(4).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, dict[int, list[dict[str, float]]]] = {method: {} for method in METHODS}
    seconds = []
    for seed in range(arguments.seeds):
        start = time.monotonic()
        for run in play_demo(arguments.folder / f"seed-{seed}", seed=seed):
            for iteration, metrics in Results(run).evaluations().items():
                found[run.name].setdefault(iteration, []).append(metrics)
        seconds.append(round(time.monotonic() - start, 1))

    def values(method: str, iteration: int, metric: str) -> np.ndarray:
        return np.array([metrics[metric] for metrics in found[method][iteration]])

    last = max(found["sft"])
    result = {
        "what": "sparring demo, all methods, seeds 0 to n-1",
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}, one thread",
        "versions": {name: version(name) for name in ("sparring", "torch", "transformers")},
        "seconds_per_demo": seconds,
        "by_iteration": {
            method: {
                metric: {("start" if t < 0 else t): interval(values(method, t, metric)) for t in sorted(found[method])}
                for metric in METRICS
            }
            for method in METHODS
        },
        "last_minus_start": {
            method: {m: interval(values(method, last, m) - values(method, -1, m)) for m in METRICS}
            for method in METHODS
        },
        "last_minus_sft": {
            method: {m: interval(values(method, last, m) - values("sft", last, m)) for m in METRICS}
            for method in METHODS
            if method != "sft"
        },
        "best_sft_nll_minus_last": {
            method: interval(
                np.min([values("sft", t, "held_out_nll") for t in range(last + 1)], axis=0)
                - values(method, last, "held_out_nll")
            )
            for method in METHODS
        },
    }
    target = Path(__file__).parent / "results" / "demo_seeds.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: result[k] for k in ("seconds_per_demo", "last_minus_start", "last_minus_sft")}, indent=1))


if __name__ == "__main__":
    main()
