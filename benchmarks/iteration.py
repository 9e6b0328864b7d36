"""Estimates the minutes of one iteration of SPIN: a 7B model, 50,000 pairs, 8 H100.

Generation, scoring and training are `sparring plan`'s: FLOPs and bytes counted from the config, at assumed shares of a
GPU's peak. Disks, starts and copies are assumptions, and are printed with the result. Hashing is measured here.

    python benchmarks/iteration.py --out benchmarks/results/iteration.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from scale import ANSWER_TOKENS, MISTRAL_7B, PROMPT_TOKENS, Assumptions, checkpoint_wait, processor

from sparring.commands.plan import BANDWIDTH, GPUS, SCORE, TRAIN, ModelSize, RowTokens, gpu_speed, plan
from sparring.recipe.load import load_recipe
from sparring.run.manifest import hash_path

ROOT = Path(__file__).parents[1]
ROWS, HELD_OUT, NUM_GPUS, GPU = 50_000, 500, 8, "h100"
LENGTHS = RowTokens(ROWS, PROMPT_TOKENS, ANSWER_TOKENS, ANSWER_TOKENS)


@dataclass(frozen=True)
class Assumed:
    engine_starts_seconds: float = 60.0
    process_starts_seconds: float = 15.0  # imports and NCCL, for the ranks of a stage
    read_bytes_per_second: float = 5e9  # weights, from the page cache or a local disk
    write_bytes_per_second: float = 2e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        Path(folder, "config.json").write_text(json.dumps(MISTRAL_7B))
        hashed = hash_bytes_per_second(Path(folder) / "weights")
        minutes = estimate(Path(folder), Assumed(), hashed)
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}; arithmetic, nothing but hashing was timed",
        "assumed": asdict(Assumed())
        | {"gpu": GPU, "gpus": NUM_GPUS, "rows": ROWS, "held_out": HELD_OUT}
        | {"prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS}
        | {"share_of_peak_training": TRAIN, "share_of_peak_scoring": SCORE, "share_of_bandwidth": BANDWIDTH},
        "hash_bytes_per_second": round(hashed / 1e9, 2) * 1e9,
        "minutes": {name: round(value, 2) for name, value in minutes.items()},
        "sum": round(sum(minutes.values()), 1),
    }
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if out:
        out.write_text(text)


def estimate(folder: Path, assumed: Assumed, hash_rate: float) -> dict[str, float]:
    """Minutes of iteration 0 by what they are spent on."""
    recipe = load_recipe(ROOT / "recipes" / "spin-zephyr-7b.yaml", [f"model={folder}"])
    size = ModelSize.of(folder, "bfloat16")
    speed = gpu_speed(GPUS[GPU], recipe, size, LENGTHS)
    stages = plan(recipe, folder, LENGTHS, NUM_GPUS, speed, GPUS[GPU]).iterations[0]
    weights = 4 * (size.body + 2 * size.head)  # float32 on disk, as trained
    load = assumed.process_starts_seconds + weights / assumed.read_bytes_per_second
    saves = stages.train // (60 * recipe.train.checkpoint_minutes)
    held_out = HELD_OUT / ROWS * (2 * stages.generate + stages.score / 2)  # greedy and sampled answers, and the NLL
    seconds = {
        "generate": stages.generate,
        "score": stages.score,
        "train": stages.train,
        "checkpoints": saves * checkpoint_wait(size, Assumptions()),
        "start the engine, to generate and to evaluate": 2 * assumed.engine_starts_seconds,
        "load the model, to score, to train and to evaluate": 3 * load,
        "save the model": weights / assumed.write_bytes_per_second + weights / hash_rate,
        "evaluate": held_out,
    }
    return {name: value / 60 for name, value in seconds.items()}


def hash_bytes_per_second(file: Path) -> float:
    num_bytes = 2**29
    file.write_bytes(bytes(num_bytes))
    start = time.process_time()
    hash_path(file)
    return num_bytes / (time.process_time() - start)


if __name__ == "__main__":
    main()
