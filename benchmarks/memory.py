"""What holds memory at the peak of a step: every tensor that is alive then, by the operation that made it.

    python benchmarks/memory.py --out benchmarks/results/memory.json        some minutes

One step of benchmarks/step.py, forward and backward. A dispatch mode sees every tensor that torch makes, and when its
memory is given back; the process's own peak in a step without the mode tells what tensors do not explain: what
operations take inside, and what the allocator keeps. Each arm is a process of its own. MiB over the weights.

    shared             sparring
    shared, checkpointed   with train.gradient_checkpointing
    shared, small pages    without the large pages that sparring asks torch for
    plain              as in benchmarks/step.py

Arms that the file holds already are not measured again.
"""

from __future__ import annotations

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MEMORY_PAGES": os.environ.get("THP_MEM_ALLOC_ENABLE", "1"),
}

import argparse
import json
import resource
import subprocess
import sys
import time
import weakref
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from step import limits, machine, resident_mib
from step_arms import all_cases, make_step
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ARMS = {  # arm of step.py, gradient checkpointing, large pages
    "shared, checkpointed": ("shared", True, "1"),
    "shared": ("shared", False, "1"),
    "plain": ("plain", False, "1"),
    "shared, small pages": ("shared", False, "0"),
}
MIB = 2**20


class Tracker(TorchDispatchMode):
    """Bytes of tensors that are alive, by operation, at the moment when they are most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: Counter[str] = Counter()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self.phase = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self.sizes:
                    self.add(storage, f"{self.phase} {func.overloadpacket.__name__} {list(leaf.shape)}")
        return found

    def add(self, storage: torch.UntypedStorage, name: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.sizes[key] = size
        self.alive[name] += size
        self.now += size
        weakref.finalize(storage, self.drop, key, name)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, self.alive.copy()

    def drop(self, key: int, name: str) -> None:
        size = self.sizes.pop(key)
        self.alive[name] -= size
        self.now -= size


def measure(arm: str, case_name: str) -> dict[str, Any]:
    kind, is_checkpointed, _ = ARMS[arm]
    os.environ["THP_MEM_ALLOC_ENABLE"] = os.environ["MEMORY_PAGES"]  # step.py has set it; torch reads it once
    case = all_cases()[case_name]
    torch.set_num_threads(1)
    model, step = make_step(kind, case)
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    before = resident_mib()
    cpu = time.process_time()
    step().backward()
    cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before
    model.zero_grad(set_to_none=True)
    tracker = Tracker()
    with tracker:
        loss = step()
        tracker.phase = "backward"
        loss.backward()
    gradients = sum(p.numel() * 4 for p in model.parameters()) / MIB
    holders = [[name, round(size / MIB, 1)] for name, size in tracker.at_peak.most_common(16) if size > MIB]
    return {
        "process_peak_mib": round(peak),
        "tensors_peak_mib": round(tracker.peak / MIB),
        "peak_is_in": "the backward pass"
        if any(name.startswith("backward") for name in tracker.at_peak)
        else "forward",
        "gradients_mib": round(gradients),
        "first_step_cpu_seconds": round(cpu, 2),
        "holders": holders,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--case", default="64/192 pair fp32")
    parser.add_argument("--arm", help="measure this one, in this process, and print")
    arguments = parser.parse_args()
    if arguments.arm is not None:
        print(json.dumps(measure(arguments.arm, arguments.case)))
        return
    known = json.loads(arguments.out.read_text(encoding="utf-8"))["arms"] if arguments.out.exists() else {}
    result: dict[str, Any] = {
        "case": arguments.case,
        "machine": machine(),
        "versions": {name: version(name) for name in ("sparring", "torch", "transformers")},
        "least_mib": limits(all_cases()[arguments.case])["least_mib"],
        "arms": known,
    }
    for arm, (_, _, pages) in ARMS.items():
        if arm in known:
            continue
        command = [sys.executable, __file__, "--out", str(arguments.out), "--case", arguments.case, "--arm", arm]
        environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": pages}
        ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        result["arms"][arm] = json.loads(ran.stdout.splitlines()[-1])
        print(arm, result["arms"][arm], flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
