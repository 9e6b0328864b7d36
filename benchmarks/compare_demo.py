"""`sparring compare` on the demo's task, four methods and three seeds: its numbers, its figure, and how long it takes.

    python benchmarks/compare_demo.py FOLDER

Writes benchmarks/results/compare_demo.json and docs/compare.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from demo_seeds import cpu_name

from sparring.commands.compare import compare
from sparring.commands.demo import GAME, ITERATIONS, START, demo_recipe, write_task
from sparring.loop import play
from sparring.report.comparison import figures
from sparring.report.figures import COLOURS

ROOT = Path(__file__).parents[1]
INK = {"currentColor": "#777777", "var(--line)": "#dddddd", "var(--soft)": "#bbbbbb"}
INK |= {f"var(--{name})": colour for name, colour in COLOURS.items()}
"""The report's figures follow its page; this one stands alone, on light or dark."""

METHODS = ("sft", "spin", "tspin", "space")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    write_task(folder / "task", 0)
    start = play(demo_recipe(folder, folder / "task" / "model", "sft", 0, iterations=1, train=START), folder / "start")
    recipe = demo_recipe(folder, start.model(0), "space", 0, iterations=ITERATIONS, train=GAME)
    root = folder / "all"
    is_new, began = not root.exists(), time.monotonic()
    comparison = compare(recipe, root, METHODS, seeds=3, fractions=(0.25, 1.0))
    clock = folder / "seconds"
    if is_new:  # the time of one that goes on is not its time
        clock.write_text(str(time.monotonic() - began), encoding="utf-8")
    numbers = json.loads((root / "comparison.json").read_text(encoding="utf-8").replace(f"{folder}/", ""))
    result = {
        "what": "sparring compare on the demo's task: 4 methods, 3 seeds, all rows and a quarter of them, one process",
        "processor": f"{cpu_name()}, {os.cpu_count()} cores, one thread",
        "seconds": round(float(clock.read_text(encoding="utf-8"))),
        **numbers,
    }
    target = ROOT / "benchmarks" / "results" / "compare_demo.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    figure = figures(comparison, comparison.as_json())[0].svg
    for themed, fixed in INK.items():
        figure = figure.replace(themed, fixed)
    (ROOT / "docs" / "compare.svg").write_text(figure + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
