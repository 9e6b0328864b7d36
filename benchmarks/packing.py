"""How full micro-batches are, and how many tokens shared rows save, on the lengths of real data.

    python benchmarks/packing.py TOKENIZER_FOLDER ROWS.jsonl... --out benchmarks/results/packing.json

Rows are rendered as a run would. No answers are drawn: the generated answer of a row has the length of another row's
real answer, and the proto answer of a third's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sparring.data.tables import read_rendered
from sparring.model.packing import Kind, arrange, group_tokens, micro_batches
from sparring.recipe.schema import Recipe
from sparring.run.rundir import RunDir
from sparring.stages.prepare import prepare
from sparring.types import Group


def lengths_of(model: Path, rows: Path, limit: int) -> list[tuple[int, int]]:
    """Tokens of (prompt, real answer) of each usable row."""
    data = {"train": str(rows), "held_out": 0, "template": "{prompt}\n", "limit": limit, "max_rejected": 1.0}
    raw = {"model": str(model), "method": "tspin", "data": data, "generate": {"max_new_tokens": 1024}}
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(folder)
        with run.own():
            prepare(run, Recipe.model_validate(raw))
        return [(len(row.prompt_ids), len(row.real_ids)) for row in read_rendered(run.data / "train.parquet")]


def make_groups(lengths: list[tuple[int, int]], is_triplet: bool) -> list[Group]:
    """Random tokens of these lengths."""
    random = np.random.default_rng(0)
    others = [random.permutation(len(lengths)) for _ in range(2)]

    def tokens(count: int) -> np.ndarray:
        return random.integers(1, 30_000, count).astype(np.int32)

    groups = []
    for i, (prompt, real) in enumerate(lengths):
        responses: dict[Any, tuple[np.ndarray, ...]] = {
            "real": (tokens(real),),
            "generated": (tokens(lengths[others[0][i]][1]),),
        }
        if is_triplet:
            responses["proto"] = (tokens(lengths[others[1][i]][1]),)
        groups.append(Group(str(i), tokens(prompt), responses))
    return groups


def measure(groups: list[Group], kind: Kind, budget: int, step: int | None) -> dict[str, Any]:
    """Positions that the model computes against those that hold a token, and against whole budgets."""
    steps = [groups[i : i + step] for i in range(0, len(groups), step)] if step else [groups]
    held = computed = batches = 0
    for chosen in steps:
        for batch in micro_batches(kind, chosen, budget):
            layout = arrange(kind, [chosen[i] for i in batch])
            held += layout.computed_tokens
            computed += layout.input_ids.numel()
            batches += 1
    return {
        "tokens": held,
        "share_of_positions_with_a_token": round(held / computed, 4),
        "share_of_budget_used": round(held / (batches * budget), 4),
        "micro_batches": batches,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--budget", type=int, default=8192)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    results = []
    for rows in arguments.rows:
        lengths = lengths_of(arguments.tokenizer, rows, arguments.limit)
        for is_triplet in (False, True):
            groups = make_groups(lengths, is_triplet)
            assert max(group_tokens("shared", group) for group in groups) <= arguments.budget
            results.append(
                {
                    "rows": rows.name,
                    "game": "triplet" if is_triplet else "pair",
                    "groups": len(groups),
                    "mean_tokens": {
                        "prompt": round(float(np.mean([p for p, _ in lengths])), 1),
                        "answer": round(float(np.mean([r for _, r in lengths])), 1),
                    },
                    **{
                        f"{kind}, {'score' if step is None else f'steps of {step}'}": measure(
                            groups, kind, arguments.budget, step
                        )
                        for kind in ("padded", "shared")
                        for step in (None, 64)
                    },
                }
            )
    result = {"budget": arguments.budget, "versions": {"sparring": version("sparring")}, "results": results}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
