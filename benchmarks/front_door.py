"""Measures how long the first commands take, as cold processes.

    python benchmarks/front_door.py --out benchmarks/results/front_door.json [--rounds 7]
        [--stories FILE --story-model FOLDER]      a pretrained model and real rows, as for recipes/tiny-*.yaml

Measures `--help`; init, doctor and preview on the demo's task (1,000 rows); doctor on a 7B config with 2,000 rows of
chat length; and doctor on the real model and rows if given. doctor reads no weights, so a config and a tokenizer
suffice.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

from demo_seeds import cpu_name
from transformers import MistralConfig

from sparring.commands.demo import make_tokenizer, problems, write_task

ROOT = Path(__file__).parents[1]
GOALS = {"--help": 0.3, "doctor": 10.0}
"""Most wall-clock seconds that a user should wait."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stories", type=Path)
    parser.add_argument("--story-model", type=Path)
    parser.add_argument("--only", default="", help="measure only commands whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        commands = make_commands(Path(name), options.stories, options.story_model)
        found = {
            what: measure(command, options.rounds, Path(name))
            for what, command in commands.items()
            if options.only in what
        }
        needs = forecast_7b(Path(name))
    result = {
        "what": "seconds of whole processes; median, and the slowest of the rounds",
        "processor": f"{cpu_name()}, {os.cpu_count()} cores",
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "versions": {package: version(package) for package in ("torch", "transformers", "typer", "pydantic")},
        "rounds": options.rounds,
        "goals": GOALS,
        "commands": found,
        "adapter_7b": needs,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for what, numbers in found.items():
        print(f"{what:26} {' '.join(f'{name} {value:.2f}' for name, value in numbers.items())}")


def make_commands(folder: Path, stories: Path | None, story_model: Path | None) -> dict[str, list[str]]:
    write_task(folder / "task", 0)
    model, rows = folder / "task" / "model", folder / "task" / "train.jsonl"
    large = folder / "large"
    tokenizer = make_tokenizer(problems(50, 0, 9))
    tokenizer.save_pretrained(large)
    MistralConfig(vocab_size=32000, max_position_embeddings=32768).save_pretrained(large)
    words = " ".join(row["question"] for row in problems(60, 1, 9))
    chats = [{"question": f"{i} eggs {words[: 600 + i % 300]}", "answer": words[300:1300]} for i in range(2000)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats), encoding="utf-8")
    recipe = {"model": str(model), "method": "tspin", "data": {"train": str(rows)}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    adapter = [str(ROOT / "recipes" / "tspin-lora-7b.yaml"), f"model={large}", f"data.train={folder / 'chats.jsonl'}"]
    adapter += ["generate.backend=hf"]  # vLLM need not be installed
    found = {
        "--help": ["--help"],
        "run --help": ["run", "--help"],
        "a misspelt key": ["doctor", str(folder / "recipe.yaml"), "train.epoch=1"],
        "init, the demo's rows": ["init", "OUT", "--model", str(model), "--data", str(rows), "--method", "tspin"],
        "doctor, the demo's rows": ["doctor", str(folder / "recipe.yaml")],
        "doctor, 7B, 2,000 chats": ["doctor", *adapter, "data.template=null", "data.limit=2000", "data.held_out=100"],
        "preview, the demo's rows": ["preview", str(folder / "recipe.yaml")],
    }
    if stories and story_model:
        tiny = [str(ROOT / "recipes" / "tiny-tspin.yaml"), f"model={story_model}", f"data.train={stories}"]
        found["doctor, stories"] = ["doctor", *tiny]
    return found


def measure(arguments: Sequence[str], rounds: int, folder: Path) -> dict[str, float]:
    walls, cpus = [], []
    for number in range(rounds + 1):
        command = [a.replace("OUT", str(folder / f"written-{number}.yaml")) if a == "OUT" else a for a in arguments]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", "sparring.cli", *command], capture_output=True, text=True, check=False
        )
        wall = time.monotonic() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if ended.returncode and "train.epoch=1" not in command and "7b" not in " ".join(command):
            raise SystemExit(f"{command}: {ended.stdout}{ended.stderr}")
        if number:  # the first round fills the disk cache
            walls.append(wall)
            cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"wall_seconds": median(walls), "slowest": max(walls), "cpu_seconds": median(cpus)}


def forecast_7b(folder: Path) -> list[dict[str, float]]:
    """Forecast of training memory for an adapter on 7B, in GiB, by tokens per micro-batch."""
    from sparring.commands.forecast import forecast, training_bytes
    from sparring.recipe.load import load_recipe

    found = []
    for tokens in (8192, 4096, 2048):
        for is_checkpointed in (True, False):
            overrides = (
                f"model={folder / 'large'}",
                f"train.micro_batch_tokens={tokens}",
                f"train.gradient_checkpointing={str(is_checkpointed).lower()}",
            )
            recipe = load_recipe(ROOT / "recipes" / "tspin-lora-7b.yaml", overrides)
            needs = forecast(recipe, folder / "large", 50_000)
            found.append(
                {
                    "micro_batch_tokens": tokens,
                    "gradient_checkpointing": is_checkpointed,
                    "parameters": needs.num_parameters,
                    "trained": needs.num_trained,
                    "state_gib": needs.state_bytes / 2**30,
                    "peak_gib": training_bytes(recipe, folder / "large", "cuda", 1) / 2**30,
                    "disk_gib": needs.disk_bytes / 2**30,
                }
            )
    return found


if __name__ == "__main__":
    main()
