"""Simulates `sparring tune` on synthetic landscapes: how often does it return something worse than tuned SFT?

    python benchmarks/tune_landscapes.py --out benchmarks/results/tune_landscapes.json

The search and the rule that returns another method than SFT are the real ones; only playing is replaced. A landscape
has, for every method, a best learning rate, a width, a gain and a coefficient's influence, drawn at random; too high a
rate declines with iterations. A model's loss on a row is its true loss plus the row's difficulty plus noise of its own.
In "equal" landscapes all methods reach the same loss; in "different" ones their best losses have a standard deviation
of 0.02.

The full grid spends the same seconds on rates that lie evenly in the range, all methods alike, coefficients of the
papers, and every iteration.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from demo_seeds import cpu_name

from sparring.commands.tune import COEFFICIENTS, Space, open_study, search
from sparring.run.estimate import estimate

METHODS = ("sft", "spin", "tspin", "space")
SPACE = Space(METHODS, 1e-6, 1e-4)
ITERATIONS, ROWS = 4, 200
SECONDS = {"sft": 60.0, "spin": 120.0, "tspin": 120.0, "space": 120.0}
BUDGET = 6000.0
DIFFICULTY, NOISE = 0.5, 0.1  # nats: between rows, and between models on a row


class Model(NamedTuple):
    label: str
    iteration: int


@dataclass(frozen=True)
class Landscape:
    seed: int
    spread: float  # of the methods' best losses

    def __post_init__(self) -> None:
        draw = np.random.default_rng(self.seed)
        shape = {
            method: (draw.uniform(0.2, 0.9), draw.uniform(0.1, 0.3), 0.3 + self.spread * draw.normal(), draw.normal())
            for method in METHODS
        }
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "difficulty", DIFFICULTY * draw.normal(size=2 * ROWS))

    def true_loss(self, model: Model) -> float:
        """Of a trial after an iteration; -1 is the starting model."""
        if model.iteration < 0:
            return 1.0
        method, *parts = model.label.split(":")
        settings = dict(part.split("=") for part in parts)
        best, width, gain, preferred = self.shape[method]  # type: ignore[attr-defined]
        place = math.log(float(settings["train.learning_rate"]) / SPACE.low) / math.log(SPACE.high / SPACE.low)
        fit = math.exp(-(((place - best) / width) ** 2) / 2)
        if method in COEFFICIENTS:
            key, value = COEFFICIENTS[method]
            fit *= math.exp(-((math.log10(float(settings[key]) / value) - 0.3 * preferred) ** 2) / 2)
        decline = 0.05 * max(0.0, place - best) * model.iteration
        return 1.0 - gain * fit * (1 - 0.5 ** (model.iteration + 1)) + decline

    def losses(self, model: Model) -> np.ndarray:
        """On every held-out row; the first half chooses."""
        digest = blake2b(f"{self.seed} {model.label if model.iteration >= 0 else ''} {model.iteration}".encode())
        noise = np.random.default_rng(int.from_bytes(digest.digest()[:8], "little")).normal(size=2 * ROWS)
        return self.true_loss(model) + self.difficulty + NOISE * noise  # type: ignore[attr-defined]

    def choosing(self, model: Model) -> float:
        return float(self.losses(model)[:ROWS].mean())

    def returned(self, models: Sequence[Model]) -> tuple[Model, Model]:
        """(what is returned, tuned SFT), by the rule of report/tuning.py."""
        ranked = sorted(models, key=self.choosing)
        sft = next(model for model in ranked if model.label.startswith("sft:"))
        game = next((model for model in ranked if not model.label.startswith("sft:")), sft)
        judged = estimate((self.losses(game) - self.losses(sft))[ROWS:])
        return (game if judged.sign < 0 else sft), sft

    def best_loss(self) -> float:
        """With the best settings of every method, on a fine grid."""
        places = np.linspace(0, 1, 101)
        found = [1.0]
        for method in METHODS:
            for place in places:
                label = f"{method}:train.learning_rate={SPACE.rate(float(place))}"
                if method in COEFFICIENTS:
                    key, value = COEFFICIENTS[method]
                    preferred = self.shape[method][3]  # type: ignore[attr-defined]
                    label = (
                        f"{method}:{key}={value * 10 ** float(np.clip(0.3 * preferred, -1, 1))}:"
                        + label[len(method) + 1 :]
                    )
                found.extend(self.true_loss(Model(label, index)) for index in range(ITERATIONS))
        return min(found)


def by_tune(land: Landscape) -> list[Model]:
    played: list[Model] = []

    def play(label: str, index: int) -> tuple[float, float]:
        played.append(Model(label, index))
        own = [land.choosing(model) for model in played if model.label == label]
        return min(own), SECONDS[label.partition(":")[0]]

    search(open_study(None, True, ITERATIONS, land.seed), SPACE, ITERATIONS, play, BUDGET)
    return played


def by_grid() -> list[Model]:
    count = int(BUDGET / (ITERATIONS * sum(SECONDS.values())))
    labels = []
    for place in (np.arange(count) + 0.5) / count:
        for method in METHODS:
            parts = [method, f"train.learning_rate={SPACE.rate(float(place)):.3g}"]
            if method in COEFFICIENTS:
                parts.insert(1, "{}={}".format(*COEFFICIENTS[method]))
            labels.append(":".join(parts))
    return [Model(label, index) for label in labels for index in range(ITERATIONS)]


def simulate(count: int, spread: float) -> dict[str, object]:
    rows = []
    for seed in range(count):
        land = Landscape(seed, spread)
        best = land.best_loss()
        row = []
        for models in (by_tune(land), by_grid()):
            chosen, sft = land.returned(models)
            row += [land.true_loss(chosen) - land.true_loss(sft), land.true_loss(chosen) - best, len(set(models))]
        rows.append(row)
    found = np.array(rows)
    arms = {}
    for number, arm in enumerate(("tune", "grid")):
        over_sft, regret, played = found[:, 3 * number : 3 * number + 3].T
        arms[arm] = {
            "worse_than_tuned_sft": float((over_sft > 0).mean()),
            "better_than_tuned_sft": float((over_sft < 0).mean()),
            "mean_loss_if_worse": float(over_sft[over_sft > 0].mean()) if (over_sft > 0).any() else 0.0,
            "regret": {name: round(float(np.quantile(regret, q)), 4) for name, q in (("median", 0.5), ("95 %", 0.95))},
            "mean_regret": round(float(regret.mean()), 4),
            "iterations_played": round(float(played.mean()), 1),
        }
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--landscapes", type=int, default=1000)
    arguments = parser.parse_args()
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": cpu_name(),
        "versions": {name: version(name) for name in ("sparring", "optuna", "numpy")},
        "landscapes": arguments.landscapes,
        "rows_of_each_half": ROWS,
        "budget_seconds": BUDGET,
        "equal": simulate(arguments.landscapes, 0.0),
        "different": simulate(arguments.landscapes, 0.02),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
