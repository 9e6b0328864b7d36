"""Puts the tables of benchmarks/results/step.json into docs/performance.md.

    python benchmarks/step_page.py

A table stands between `<!-- step: NAME -->` and `<!-- end -->`; what stands there is replaced. A test holds the page
to the numbers.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from page import filled as page_with_tables
from page import line

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "benchmarks" / "results" / "step.json"
PAGE = ROOT / "docs" / "performance.md"

NAMES = {
    "plain": "plain loop",
    "two-models": "two models",
    "trl": "TRL as it comes",
    "trl-cached": "cached",
    "trl-tuned": "tuned",
    "trl-cpo": "TRL's CPO, twice",
    "padded": "padded rows",
    "shared-pair": "a pair",
}
PROFILES = ("chat", "long-prompt", "long-answer")
TABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # arms beside ours, and cases
    "pairs": (
        ("two-models", "plain", "trl", "trl-cached", "trl-tuned", "padded"),
        tuple(f"{profile} pair {dtype}" for profile in PROFILES for dtype in ("fp32", "bf16")),
    ),
    "triplets": (
        ("plain", "trl-cpo", "padded", "shared-pair"),
        tuple(f"{profile} triplet {dtype}" for profile in PROFILES for dtype in ("fp32", "bf16")),
    ),
    "shapes": (
        ("plain", "trl-tuned"),
        tuple(
            f"{shape} {dtype}{size}"
            for shape, size in (
                ("256/64 pair", ""),
                ("128/128 pair", ""),
                ("64/192 pair", ""),
                ("chat pair", " 150k"),
                ("chat pair", " 160m"),
            )
            for dtype in ("fp32", "bf16")
        ),
    ),
    "answers": (("plain",), tuple(f"chat k={k} {dtype}" for dtype in ("fp32", "bf16") for k in (1, 3, 7))),
    "rows": (("padded",), tuple(f"row-{k}k {dtype}" for dtype in ("fp32", "bf16") for k in (2, 4, 8))),
}


@cache
def results() -> dict:
    return json.loads(NUMBERS.read_text(encoding="utf-8"))["results"]


def table(name: str) -> list[str]:
    """A line per case that was measured: our seconds, everybody else's as times ours, and bytes over the weights."""
    arms, cases = TABLES[name]
    heads = ["", "seconds", *(NAMES[arm] for arm in arms), "of the matrix peak", "MiB over the weights: ours, theirs"]
    lines = [line(heads), line(["---"] * len(heads))]
    for case in cases:
        if case not in results():
            continue
        found = results()[case]["summary"]
        ours, others = found["arms"]["shared"], [found["arms"].get(arm) for arm in arms]
        seconds = ours["seconds"]
        lines.append(
            line(
                [
                    f"{case.replace(' pair', '').replace(' triplet', '')}",
                    f"{seconds['median']:.2f} ({seconds['min']:.2f} to {seconds['max']:.2f}), {found['rounds']} rounds",
                    *(f"{other['times_ours']:.2f}" if other else "" for other in others),
                    f"{ours['share_of_matrix_peak']:.0%}".replace("%", " %"),
                    f"{ours['mib_over_weights']:,}; "
                    + ", ".join(f"{other['mib_over_weights']:,}" for other in others if other),
                ]
            )
        )
    return lines


def filled(page: str) -> str:
    """The page with its tables made anew."""
    return page_with_tables(page, "step", table)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
