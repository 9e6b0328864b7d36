"""What `train.micro_batch_tokens` costs and brings on a CPU: time and memory of one step at several budgets.

    python benchmarks/budget.py --out benchmarks/results/budget.json        some minutes

Chat pairs and the model of 27 million parameters of benchmarks/step.py, one thread. Each budget is a process of its own
in turn, several rounds after a step to warm up. CPU seconds; MiB over the weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step import machine, resident_mib
from step_arms import Case, make_groups, make_model

from sparring.model.logprobs import Scorer
from sparring.model.packing import group_tokens
from sparring.objectives import Spin
from sparring.stages.train.loop import Play, forward_backward

BUDGETS = (512, 1024, 2048, 4096, 8192)


def child(budget: int, case: Case, pipe: Connection) -> None:
    plays = [
        Play(
            group,
            {
                "real": np.float32(-10.0 * len(group.responses["real"][0])),
                "generated": np.array([-10.0 * len(group.responses["generated"][0])], dtype=np.float32),
            },
        )
        for group in make_groups(case)
    ]
    model = make_model(case.model, case.vocab)
    scorer = Scorer(model, getattr(torch, case.dtype))
    before = resident_mib()
    while True:
        cpu = time.process_time()
        forward_backward(scorer, Spin(), plays, budget)
        cpu = time.process_time() - cpu
        model.zero_grad(set_to_none=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before
        pipe.send((cpu, peak))
        if not pipe.recv():
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    case = Case("chat", arguments.dtype, groups=arguments.groups)
    fork = get_context("fork")  # without importing everything again
    pipes: dict[int, Connection] = {}
    for budget in BUDGETS:
        pipes[budget], theirs = fork.Pipe()
        fork.Process(target=child, args=(budget, case, theirs), daemon=True).start()
        pipes[budget].recv()  # to warm up
    found: dict[int, list[Any]] = {budget: [] for budget in BUDGETS}
    for _ in range(arguments.rounds):
        for budget, pipe in pipes.items():
            pipe.send(True)
            found[budget].append(pipe.recv())
    result = {
        "machine": machine(),
        "versions": {name: version(name) for name in ("sparring", "torch", "transformers")},
        "dtype": arguments.dtype,
        "tokens": sum(group_tokens("shared", group) for group in make_groups(case)),
        "budgets": {
            budget: {
                "cpu_seconds": [round(cpu, 2) for cpu, _ in values],
                "median": round(statistics.median(cpu for cpu, _ in values), 2),
                "mib_over_weights": round(max(peak for _, peak in values)),
            }
            for budget, values in found.items()
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
