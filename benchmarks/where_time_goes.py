"""What a step of benchmarks/step.py spends its time on: matrix products, and all that is none.

    python benchmarks/where_time_goes.py --out benchmarks/results/where_time_goes.json "long-prompt pair bf16" ...

For each case: `--rounds` steps of sparring without a profiler, whose least CPU seconds stand for the step, and as many
under torch's profiler, whose median shares of self time are reported by kind of operation. One thread. The profiler
slows many small operations down, so that its seconds are not the step's.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}  # as benchmarks/step.py

import argparse
import json
import statistics
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from step import limits, machine, matrix_peak
from step_arms import Case, all_cases, make_step
from torch.profiler import ProfilerActivity, profile

KINDS = {  # the operations of torch that take most of the time
    "matrix products": {"mm", "bmm", "addmm", "baddbmm"},
    "torch's attention": {
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward",
    },
    "copies, casts, new tensors": {"copy_", "cat", "fill_", "empty_strided", "empty_like", "empty", "where", "gather"},
    "softmax and exponentials": {"_softmax", "exp_", "exp", "amax", "logsumexp", "log", "log_"},
    "additions, multiplications, norms": {
        *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "pow", "sum", "mean", "rsqrt", "neg"),
        *("silu", "silu_backward", "masked_fill_"),
    },
}


def kind_of(operation: str) -> str:
    name = operation.removeprefix("aten::")
    return next((kind for kind, names in KINDS.items() if name in names), "everything else")


def measure(case: Case, rounds: int) -> dict[str, Any]:
    model, step = make_step("shared", case)
    step().backward()
    seconds, peaks = [], []
    for _ in range(rounds):
        model.zero_grad()
        peaks.append(matrix_peak(case.dtype))
        start = time.process_time()
        step().backward()
        seconds.append(time.process_time() - start)
    shares: list[Counter[str]] = []
    products = []
    for _ in range(rounds):
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step().backward()
        found: Counter[str] = Counter()
        for event in profiler.key_averages():
            found[kind_of(event.key)] += event.self_cpu_time_total
        products.append(found["matrix products"] / 1e6)
        shares.append(Counter({kind: one / found.total() for kind, one in found.items()}))
    median = {kind: statistics.median(one[kind] for one in shares) for kind in [*KINDS, "everything else"]}
    gflops, peak, least = limits(case)["least_gflops"], max(peaks) / 1e9, min(seconds)
    return {
        "seconds": round(least, 3),
        "matrix_peak_gflops": round(peak, 1),
        "share_of_matrix_peak": round(gflops / least / peak, 3),
        "shares_of_time": {kind: round(share, 3) for kind, share in median.items()},
        "products_alone": {  # were all that is no product free
            "share_of_matrix_peak": round(gflops / statistics.median(products) / peak, 3)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=all_cases(), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("sparring", "torch", "transformers")},
        "rounds": wanted.rounds,
        "cases": {},
    }
    for name in wanted.cases:
        result["cases"][name] = measure(all_cases()[name], wanted.rounds)
        print(name, json.dumps(result["cases"][name], indent=1), flush=True)
    wanted.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
