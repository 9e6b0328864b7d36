"""Compares `sparring plan` with the published times of SPIN.

SPIN (arXiv 2401.01335, appendix B.2): zephyr-7b, 50k prompts, 8 A100 with 80 GB: 1.45 h of generation and 4.32 h of
training in iteration 0; 6.69 s and 10 s per 64 examples. Lengths are not published; 150 and 256 tokens are assumed.

    python benchmarks/plan_spin.py --out benchmarks/results/plan_spin.json
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from scale import MISTRAL_7B

from sparring.commands.plan import GPUS, TRAIN, ModelSize, RowTokens, gpu_speed, plan
from sparring.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
PUBLISHED = {"generate": 1.45, "train": 4.32}
ROWS, PROMPT, ANSWER, GPUS_USED = 50_000, 150.0, 256.0, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(MISTRAL_7B))
        found = compare(Path(folder))
    text = json.dumps(found, indent=1) + "\n"
    print(text, end="")
    if out:
        out.write_text(text)


def compare(folder: Path) -> dict[str, object]:
    """Hours of iteration 0 for sparring and for the published program, at the same assumed rates."""
    lengths, gpu = RowTokens(ROWS, PROMPT, ANSWER, ANSWER), GPUS["a100"]
    recipe = load_recipe(ROOT / "recipes" / "spin-zephyr-7b.yaml", [f"model={folder}", "generate.backend=hf"])
    size = ModelSize.of(folder, "bfloat16")

    def hours(batch_size: int) -> dict[str, float]:
        engine = recipe.generate.model_copy(update={"batch_size": batch_size})
        wanted = recipe.model_copy(update={"generate": engine})
        speed = gpu_speed(gpu, wanted, size, lengths)
        first = plan(wanted, folder, lengths, GPUS_USED, speed, gpu).iterations[0]
        return {name: getattr(first, name) / 3600 for name in ("generate", "score", "train")}

    ours = hours(64)
    # theirs: 64 concurrent prompts over 8 devices; one row per answer, all of it through the head; the opponent's
    # forward pass in every epoch, and one more of the policy for gradient checkpointing
    row = size.forward_flops(0.0, [PROMPT + ANSWER])
    flops = (4 + 1) * 2 * row * ROWS * recipe.train.epochs
    theirs = {"generate": hours(8)["generate"], "train": flops / (GPUS_USED * gpu.flops * TRAIN) / 3600}
    reached = flops / (GPUS_USED * gpu.flops * PUBLISHED["train"] * 3600)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}; arithmetic only, nothing was timed",
        "sparring": version("sparring"),
        "assumed": {"prompt_tokens": PROMPT, "answer_tokens": ANSWER, "share_of_peak_training": TRAIN},
        "published_hours": PUBLISHED,
        "published_program_hours": round_all(theirs),
        "published_program_over_published": round_all({name: theirs[name] / PUBLISHED[name] for name in PUBLISHED}),
        "share_of_peak_that_published_training_would_be": round(reached, 3),
        "sparring_hours": round_all(ours),
        "sparring_over_published": round_all({name: ours[name] / PUBLISHED[name] for name in PUBLISHED}),
    }


def round_all(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


if __name__ == "__main__":
    main()
