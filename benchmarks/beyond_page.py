"""Brings the seeds of benchmarks/beyond.py together: results/beyond.json, and the tables of docs/results.md.

python benchmarks/beyond_page.py FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from beyond import EXPERIMENTS
from demo_seeds import cpu_name, interval

from sparring.loop import PACKAGES

RESULTS = Path(__file__).parent / "results" / "beyond.json"
PAGE = Path(__file__).parents[1] / "docs" / "results.md"


def parts_of_a_round(curve: list, plain: list) -> int:
    """How many rounds of an arm play as many rows as one of the first arm."""
    rows = [
        point["rows"]["mean"] if isinstance(point["rows"], dict) else point["rows"] for point in (curve[1], plain[1])
    ]
    return max(1, round(rows[1] / rows[0])) if len(curve) != len(plain) else 1


def summarise(folder: Path) -> dict[str, object]:
    """Means over seeds with 95 % intervals; differences are to the experiment's first arm, paired by seed.

    A quarter round is compared with the plain round that has played as many rows by then.
    """
    experiments: dict[str, object] = {}
    for name in EXPERIMENTS:
        files = sorted(folder.glob(f"seed-*/{name}.json"))
        seeds = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        if not seeds:
            continue
        plain = next(iter(seeds[0]))
        arms: dict[str, object] = {}
        for label, first in seeds[0].items():
            per_round = parts_of_a_round(first, seeds[0][plain])
            curve = []
            for t, point in enumerate(first):
                found = {key: over([seed[label][t][key] for seed in seeds]) for key in point}
                if label != plain and t and t % per_round == 0:
                    for key in ("held_out_nll", "greedy_accuracy"):
                        apart = [seed[label][t][key] - seed[plain][t // per_round][key] for seed in seeds]
                        found[f"{key} minus that of the first arm"] = over(apart)
                curve.append(found)
            arms[label] = curve
        experiments[name] = {"seeds": [int(path.parent.name.removeprefix("seed-")) for path in files], "arms": arms}
    return {
        "what": "steps beyond the papers on the demo's task; of each arm the start, then every round",
        "machine": f"{cpu_name()}, one thread, beside other work: seconds are too many, and alike for all arms",
        "versions": {name: version(name) for name in PACKAGES},
        "experiments": experiments,
    }


def over(values: Sequence[float]) -> dict[str, object]:
    """Mean and 95 % interval over seeds; a single one has no interval."""
    if len(values) > 1:
        return interval(np.array(values))
    return {"mean": round(values[0], 4), "half_width_95": None, "seeds": [round(values[0], 4)]}


def tables(results: dict) -> dict[str, list[str]]:
    """The tables of docs/results.md, by name, as lines of Markdown."""
    found = {}
    for name, experiment in results["experiments"].items():
        arms = experiment["arms"]
        plain = next(iter(arms))
        steps = {label: parts_of_a_round(curve, arms[plain]) for label, curve in arms.items()}
        rounds = min((len(curve) - 1) // steps[label] for label, curve in arms.items())
        has_copies = "copy_rate" in arms[plain][0]
        heads = ", ".join(["start", *(str(t) for t in range(1, rounds + 1))])
        count = len(experiment["seeds"])
        columns = [
            f"{count} seed{'s' if count > 1 else ''}",
            *(["copies"] if has_copies else []),
            f"NLL: {heads}",
            "greedy accuracy",
        ]
        columns += ["NLL and accuracy at the end, to the first", "seconds"]
        lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        for label, curve in arms.items():
            marks = curve[:: steps[label]][: rounds + 1]
            nll = ", ".join(f"{point['held_out_nll']['mean']:.3f}" for point in marks)
            greedy = ", ".join(f"{point['greedy_accuracy']['mean']:.3f}" for point in marks)
            apart = ""
            if label != plain:
                change = [
                    marks[-1][f"{key} minus that of the first arm"] for key in ("held_out_nll", "greedy_accuracy")
                ]
                apart = ", ".join(f"{c['mean']:+.3f}{around(c['half_width_95'])}" for c in change)
            copies = f" {curve[0]['copy_rate']['mean']:.0%} |" if has_copies else ""
            lines.append(f"| {label} |{copies} {nll} | {greedy} | {apart} | {marks[-1]['seconds']['mean']:.1f} |")
        found[name] = lines
    return found


def around(half: float | None) -> str:
    return "" if half is None else f" ± {half:.3f}"


def filled(page: str, results: dict) -> str:
    """The page with each table between `<!-- beyond: NAME -->` and `<!-- end -->` as the results have it."""
    for name, lines in tables(results).items():
        before, mark, rest = page.partition(f"<!-- beyond: {name} -->\n")
        if mark:
            page = before + mark + "\n".join(lines) + "\n" + rest[rest.index("<!-- end -->") :]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    results = summarise(parser.parse_args().folder)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
