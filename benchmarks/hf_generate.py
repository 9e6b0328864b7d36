"""What transformers offers beside `generate` as sparring calls it, in tokens per second of one thread.

    python benchmarks/hf_generate.py --rounds 5      writes benchmarks/results/hf_generate.json

The same prompts for all, in float32, drawn until the end token or 64 tokens. `ours`: the hf engine. `static`: the same
with a static cache, whose forward pass transformers compiles on GPUs only. `continuous`: `generate_batch`, with a cache
of a fixed size, since it would take most of the machine's memory; its draws come from torch's one generator, so an
answer depends on what else is in the batch. A round gives each one turn, in turning order; the turns before the first
round are not counted. Tokens count up to the end token. The model is random and hardly ever ends an answer: what
continuous batching saves where answers end early is not in this.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from demo_seeds import cpu_name, interval
from generate import MAX_NEW_TOKENS, MODEL, make_iteration, make_task
from transformers import ContinuousBatchingConfig, GenerationConfig

from sparring.model.load import load_model
from sparring.stages.generate.hf import HfBackend
from sparring.types import Prompt

END = 3
CACHE = ContinuousBatchingConfig(page_size=32, num_blocks=512, max_batch_tokens=2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        make_task(folder, arguments.rows)
        iteration = make_iteration(folder, "hf")
        rows = sorted(iteration.train_rows(), key=lambda row: len(row.prompt_ids))
        model = load_model(Path(iteration.data.model), dtype=torch.float32, device=torch.device("cpu")).eval()
    prompts = [Prompt(row.id, 0, row.prompt_ids, MAX_NEW_TOKENS, i) for i, row in enumerate(rows)]
    ours = HfBackend(model, end_ids=[END])
    plain = model.generate

    def turn_ours() -> int:
        return sum(len(answer.token_ids) for answer in ours.generate(prompts))

    def turn_static() -> int:
        def static(*, generation_config: GenerationConfig, **words: Any) -> Any:
            generation_config.cache_implementation = "static"
            return plain(generation_config=generation_config, **words)

        cast(Any, model).generate = static
        try:
            return turn_ours()
        finally:
            cast(Any, model).generate = plain

    def turn_continuous() -> int:
        settings = GenerationConfig(
            max_new_tokens=MAX_NEW_TOKENS, do_sample=True, top_k=0, eos_token_id=END, pad_token_id=END
        )
        with torch.no_grad():
            found = cast(Any, model).generate_batch(
                inputs=[prompt.token_ids.tolist() for prompt in prompts],
                generation_config=settings,
                continuous_batching_config=CACHE,
            )
        assert len(found) == len(prompts)
        return sum(len(one.generated_tokens) for one in found.values())

    arms: dict[str, Callable[[], int]] = {"ours": turn_ours, "static": turn_static, "continuous": turn_continuous}
    before: dict[str, float] = {}
    for name, arm in arms.items():
        start = time.perf_counter()
        arm()
        before[name] = round(time.perf_counter() - start, 2)
    rates: dict[str, list[float]] = {name: [] for name in arms}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(arguments.rounds):
        for name in list(arms)[number % 3 :] + list(arms)[: number % 3]:
            start, used = time.perf_counter(), time.process_time()
            tokens = arms[name]()
            cpu[name].append(tokens / (time.process_time() - used))
            rates[name].append(tokens / (time.perf_counter() - start))
            print(number, name, tokens, round(rates[name][-1], 1), round(cpu[name][-1], 1), flush=True)
    result = {
        "what": f"{len(prompts)} prompts, at most {MAX_NEW_TOKENS} new tokens, float32, {arguments.rounds} rounds",
        "model": MODEL,
        "machine": f"{cpu_name()}, one thread; load average {os.getloadavg()[1]:.1f} at the end",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: version(name) for name in ("sparring", "torch", "transformers")},
        "first_turn_seconds": before,
        "tokens_per_second": {name: interval(np.array(values)) for name, values in rates.items()},
        "tokens_per_cpu_second": {name: interval(np.array(values)) for name, values in cpu.items()},
        "over_ours": {
            name: {
                "wall": interval(np.array(rates[name]) / np.array(rates["ours"]) - 1),
                "cpu": interval(np.array(cpu[name]) / np.array(cpu["ours"]) - 1),
            }
            for name in ("static", "continuous")
        },
    }
    target = Path(__file__).parent / "results" / "hf_generate.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["over_ours"], indent=1))


if __name__ == "__main__":
    main()
