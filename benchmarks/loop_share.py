"""How much of a run's time is neither generating, scoring, training nor evaluating.

    python benchmarks/loop_share.py FOLDER --out benchmarks/results/loop_share.json        five minutes and more

Plays SPIN on the demo's problems with a model of a few million parameters, and sets the seconds that the run itself
notes against a clock outside: of generate, score and evaluate the stage's own seconds, of train those of its steps.
What is left is the loop's: reading and verifying, starting and ending the train stage, checkpoints, commits with their
hashes and flushes, the report. Python's imports come before the outer clock, and are given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from demo_seeds import cpu_name

from sparring.commands.demo import make_model, make_tokenizer, problems
from sparring.loop import play
from sparring.model.load import num_parameters, save_model
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit, is_committed, read_manifest
from sparring.run.results import Results

NUM_TRAIN, NUM_HELD_OUT = 600, 200
WIDTH, LAYERS = 256, 6


def write_task(folder: Path) -> None:
    if is_committed(folder):
        return
    rows = problems(NUM_TRAIN + NUM_HELD_OUT, 0, 9)
    tokenizer = make_tokenizer(rows)
    with commit(folder) as work:
        for name, part in (("train", rows[:NUM_TRAIN]), ("held_out", rows[NUM_TRAIN:])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            (work / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        save_model(make_model(tokenizer, width=WIDTH, layers=LAYERS, seed=0), tokenizer, work / "model")


def make_recipe(task: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "model": str(task / "model"),
            "method": "spin",
            "iterations": 2,
            "data": {"train": str(task / "train.jsonl"), "held_out": str(task / "held_out.jsonl")},
            "generate": {"max_new_tokens": 48},
            "train": {"learning_rate": 1e-5, "batch_size": 32, "checkpoint_every": 20, "epochs": 2},
            "evaluate": {"checker": "number"},
            "threads": 1,
        }
    )


def import_seconds() -> float:
    """Of a process that imports what a run needs and ends; the second of two, when files are in memory."""
    for _ in range(2):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import sparring.loop"], check=True)
        seconds = time.perf_counter() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="empty, or with the task of an earlier call")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_task(arguments.folder / "task")
    recipe = make_recipe(arguments.folder / "task")
    imports = import_seconds()
    start, cpu = time.perf_counter(), time.process_time()
    run = play(recipe, arguments.folder / "run")
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu

    work = dict.fromkeys(("generate", "score", "train", "evaluate"), 0.0)
    train_stage = 0.0
    for index in range(-1, recipe.iterations):
        iteration = Iteration(run, recipe.at(index), index)
        for stage in iteration.stages:
            seconds = read_manifest(iteration.stage(stage)).info["seconds"]
            if stage == "train":
                train_stage += seconds
                seconds = sum(line["seconds"] for line in Results(run.root).training(index))
            work[stage] += seconds
    loop = wall - sum(work.values())
    result = {
        "what": f"SPIN, {recipe.iterations} iterations, {NUM_TRAIN} rows, 2 epochs, a checkpoint every 20 steps",
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, 1 thread",
        "versions": {name: version(name) for name in ("sparring", "torch", "transformers")},
        "dtype": recipe.train.dtype,
        "parameters": num_parameters(arguments.folder / "task" / "model"),
        "seconds": {"all": round(wall, 2), "cpu": round(cpu, 2), **{k: round(v, 2) for k, v in work.items()}},
        "loop_seconds": round(loop, 2),
        "of_which_around_the_training_steps": round(train_stage - work["train"], 2),
        "loop_share": round(loop / wall, 4),
        "import_seconds": round(imports, 2),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
