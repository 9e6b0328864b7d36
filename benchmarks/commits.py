"""What safety costs: the share of commits and hashes in a run's time, and how soon a killed run is training again.

    python benchmarks/commits.py --out benchmarks/results/commits.json

One iteration of SPIN, settings as they come (a checkpoint every 100 steps), on a random Llama of a few million
parameters, in a process of its own. Everything that is written to the run directory is counted, with its hashing and
the waiting for the disk, and everything that is read back to be verified; each second once. Then the same run is killed
between two checkpoints and started again as a user would, with the command line: from the start of that process to the
first step that is new, beside what importing and loading alone take.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from demo_seeds import cpu_name

import sparring.report
import sparring.run.manifest
import sparring.run.rundir
import sparring.stages.evaluate.held_out
import sparring.stages.generate.stage
import sparring.stages.prepare
import sparring.stages.score
import sparring.stages.train.checkpoint
import sparring.stages.train.loop
from sparring.commands.demo import make_model, make_tokenizer, problems
from sparring.model.load import load_model, save_model
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe

MODULES = [
    sparring.stages.train.checkpoint,
    sparring.run.manifest,
    sparring.stages.evaluate.held_out,
    sparring.stages.generate.stage,
    sparring.stages.prepare,
    sparring.report,
    sparring.run.rundir,
    sparring.stages.score,
    sparring.stages.train.loop,
]
KINDS = {
    "commit": "committing",
    "commit_folder": "committing",
    "commit_part": "committing",
    "replace_file": "committing",
    "has_part": "verifying",
    "verified": "verifying",
    "verify": "verifying",
    "hash_path": "verifying",
}
"""Functions of sparring.run.manifest, and what their time is counted as."""

KILLED_AT = 150


class Clock:
    """Seconds by kind. What runs inside of something counted is not counted again."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.depth = 0

    @contextmanager
    def counting(self, kind: str) -> Iterator[None]:
        self.depth += 1
        began = time.monotonic()
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.seconds[kind] += time.monotonic() - began

    def around(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self.counting(kind):
                return function(*args, **kwargs)

        @contextmanager
        def counted_context(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with self.counting(kind), function(*args, **kwargs) as found:
                yield found

        return counted_context if function.__name__ == "commit" else counted

    def watch(self) -> None:
        """In every module that knows these functions by name."""
        for name, kind in KINDS.items():
            original = getattr(sparring.run.manifest, name)
            counted = self.around(original, kind)
            for module in MODULES:
                if getattr(module, name, None) is original:
                    setattr(module, name, counted)


def make_task(folder: Path, rows: int, width: int, layers: int) -> Path:
    found = problems(rows, seed=0, largest=99)
    tokenizer = make_tokenizer(found)
    save_model(make_model(tokenizer, width=width, layers=layers, seed=0), tokenizer, folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "model": str(folder / "model"),
            "method": "spin",
            "iterations": 1,
            "data": {"train": str(folder / "rows.jsonl"), "held_out": 64},
            "generate": {"max_new_tokens": 24},
            "train": {"learning_rate": 1e-5, "batch_size": 16, "dtype": "bfloat16"},
            "threads": 1,
        }
    )
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def play_counted(recipe: Path, run: Path) -> dict[str, Any]:
    """In this process."""
    from sparring.loop import play

    clock = Clock()
    clock.watch()
    began = time.monotonic()
    play(recipe, run)
    wall = time.monotonic() - began
    written = sum(p.stat().st_size for p in run.rglob("*") if p.is_file())
    return {
        "wall_seconds": round(wall, 2),
        **{f"{kind}_seconds": round(seconds, 3) for kind, seconds in clock.seconds.items()},
        "share": round(sum(clock.seconds.values()) / wall, 4),
        "bytes_kept": written,
        "cpu_seconds": round(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]), 1),
    }


def resume(recipe: Path, run: Path) -> dict[str, Any]:
    """Seconds from the start of the command to the first new step of training, after a kill between checkpoints."""
    command = [sys.executable, "-m", "sparring", "run", str(recipe), str(run)]
    killed = subprocess.run(command, env={**os.environ, "SPARRING_FAIL_AT": f"train-step:{KILLED_AT}"}, check=False)
    assert killed.returncode == 137
    metrics = run / "iter-00" / ".train.partial" / "metrics.jsonl"
    kept = max(int(p.name.partition("-")[2]) for p in metrics.parent.glob("step-*"))
    began = time.monotonic()
    process = subprocess.Popen(command)
    while not (metrics.read_text().count("\n") == kept + 1 and process.poll() is None):
        if process.poll() is not None:
            raise RuntimeError("it ended")
        time.sleep(0.01)
    seconds = time.monotonic() - began
    process.kill()
    process.wait()
    began = time.monotonic()
    load_model(recipe.parent / "model", dtype=torch.float32, device=torch.device("cpu"))
    load = time.monotonic() - began
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import sparring.loop"], check=True)
    return {
        "killed_at_step": KILLED_AT,
        "continued_from_step": kept,
        "seconds_to_first_new_step": round(seconds, 2),
        "of_which_imports": round(time.monotonic() - began, 2),
        "of_which_model_load": round(load, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1664)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        recipe = make_task(Path(temporary), wanted.rows, wanted.width, wanted.layers)
        weights = (Path(temporary) / "model" / "model.safetensors").stat().st_size
        again = resume(recipe, Path(temporary) / "killed")
        whole = play_counted(recipe, Path(temporary) / "run")
    result = {
        "parameters": weights // 4,
        "rows": wanted.rows,
        "checkpoint_every": 100,
        "whole_run": whole,
        "resume": again,
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs, one thread, shared with other work ({platform.machine()})",
        "versions": {p: version(p) for p in ("sparring", "torch", "transformers", "xxhash")},
    }
    print(json.dumps(result, indent=1))
    if wanted.out:
        wanted.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
