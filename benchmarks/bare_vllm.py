"""vllm.LLM.generate alone, for benchmarks/generate.py. Needs only vLLM.

Reads the path of a JSON file with "model", "prompts" and "max_tokens", then an empty line per round; prints seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    task = json.loads(Path(sys.stdin.readline().strip()).read_text(encoding="utf-8"))
    llm = LLM(
        task["model"],
        dtype="float32",
        max_model_len=task["max_length"],
        max_num_seqs=task["max_num_seqs"],
        skip_tokenizer_init=True,
        enforce_eager=True,
        gpu_memory_utilization=0.15,  # of the memory, on a CPU
        enable_prefix_caching=True,
        # as our engine has it on a CPU, whose random generators cannot be rewound
        enable_chunked_prefill=False,
        max_num_batched_tokens=16384,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in task["prompts"]]
    out.write("ready\n")
    for number, _ in enumerate(sys.stdin):
        sampling = [
            SamplingParams(
                seed=number * len(prompts) + i, max_tokens=task["max_tokens"], ignore_eos=True, detokenize=False
            )
            for i in range(len(prompts))
        ]
        start, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        turn = {"seconds": seconds, "cpu_seconds": time.process_time() - cpu, "tokens": num_tokens}
        out.write(json.dumps(turn) + "\n")


if __name__ == "__main__":
    main()
