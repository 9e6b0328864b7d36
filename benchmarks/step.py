"""Measures the forward and backward pass of one training step, ours and others' side by side.

    python benchmarks/step.py --out benchmarks/results/step.json                all cases, 7 rounds: an hour or two
    python benchmarks/step.py --only chat --out benchmarks/results/step.json    cases whose name contains this
    python benchmarks/step.py --minutes 4 --out benchmarks/results/step.json    stops then; run it again to resume

Each arm is its own process (one thread, same weights and tokens). In each round every arm takes one step, in turn.
Before timing, loss and gradient must agree with the first arm's (float32: 1e-4 of the gradient norm plus the last digit
of the longest sum). TRL without changes has another reference, and must have the loss log 2. Seconds are CPU seconds of
the process, which other load disturbs least. Rounds are added to those in the file. Arms:

    plain          padded rows, full logits, cached reference log-probs
    two-models     also the opponent's forward pass in every step, as in the released SPIN trainer
    trl            TRL's DPOTrainer without changes, reference on the fly     (pairs; TRL must be installed)
    trl-cached     with its precomputed reference log-probs
    trl-tuned      also with its vocabulary tile enlarged for CPUs (4096)
    trl-cpo        two terms of TRL's CPOTrainer, which together are T-SPIN's loss        (triplets)
    padded         sparring's twin: padded rows, response tokens alone through the head
    shared         sparring
    shared-pair    sparring, on the same prompts without their proto answers              (triplets)
"""

from __future__ import annotations

import os

os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "THP_MEM_ALLOC_ENABLE": "1"}  # large pages for every arm, as sparring asks for

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_seeds import cpu_name
from safetensors.torch import load_file, save_file
from step_arms import MODELS, PROFILES, Case, all_cases, make_groups, make_step
from transformers import PreTrainedModel

from sparring.model.packing import pack_padded, pack_shared
from sparring.recipe.schema import has_bfloat16_products


def child(arm: str, case: Case, expected: Path, pipe: Connection) -> None:
    """One arm: a warm-up step, whose loss and gradient are compared; then a timed step for each request."""
    model, step = make_step(arm, case)
    before = resident_mib()
    loss = step()
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # before the comparison, which needs more memory
    error = compare(arm, case, loss.detach(), model, expected)
    pipe.send({"mib": peak - before, "gradient_error": error})
    while pipe.recv():
        model.zero_grad()
        start = time.process_time()
        step().backward()
        pipe.send(time.process_time() - start)


def compare(arm: str, case: Case, loss: torch.Tensor, model: PreTrainedModel, expected: Path) -> float | None:
    """Distance of the gradient from the first arm's, in units of its norm. Exits if it is too large."""
    if arm == "shared-pair":  # another loss; pairs have their own comparison
        return None
    if arm == "trl":  # its reference is the policy, so its loss is known
        if abs(float(loss) - math.log(2)) > 1e-4:
            raise SystemExit(f"trl: its loss is {float(loss)}, not log 2")
        return None
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    if arm == case.arms[0]:  # the plain loop, or padded rows where full logits are too large
        save_file({"loss": loss, "gradient": gradient}, expected)
        return None
    first = load_file(expected)
    error = float((gradient - first["gradient"]).norm() / first["gradient"].norm())
    # float32's last digit is 0.001 at 8,000 nats; lambda times four of those is not an error
    longest = 1.25 * PROFILES[case.profile][1] * math.log(case.vocab)
    allowed = 1e-4 + 0.1 * 4 * float(np.spacing(np.float32(longest)))
    if case.dtype == "float32" and not (error < allowed and abs(float(loss - first["loss"])) < 1e-3):
        raise SystemExit(f"{arm} computes something else: gradient off by {error:.2g}, loss {float(loss)}")
    return error


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def limits(case: Case) -> dict[str, float]:
    """The least FLOPs and bytes that any implementation of the step needs.

    FLOPs: 6 per body weight and shared token, 6 per head weight and response token, and attention over visible keys.
    Bytes in addition to the weights: the gradient, and what one layer keeps for its backward pass.
    """
    width, inner, layers, heads, kv_heads = MODELS[case.model]
    kv = kv_heads * width // heads
    body = layers * (2 * width * width + 2 * width * kv + 3 * width * inner)
    groups = make_groups(case)
    shared = pack_shared(groups)
    visible = 0
    for prompt, *rest in shared.shared_prompts.sizes:  # type: ignore[union-attr]
        visible += prompt**2 // 2 + sum(r * prompt + r**2 // 2 for r in rest)
    tokens, size = shared.computed_tokens, 4 if case.dtype == "float32" else 2
    flops = 6 * body * tokens + 6 * width * case.vocab * int(shared.num_tokens.sum()) + 12 * layers * width * visible
    return {
        "tokens_of_rows": pack_padded(groups).computed_tokens,
        "tokens_shared": tokens,
        "least_gflops": round(flops / 1e9, 1),
        "least_mib": round(
            (4 * (body + width * case.vocab) + tokens * (4 * width + 2 * kv + 3 * inner) * size) / 2**20
        ),
    }


def matrix_peak(dtype: str) -> float:
    """FLOP/s of one core on square matrix products."""
    a, b = (torch.randn(1024, 1024).to(getattr(torch, dtype)) for _ in range(2))
    best = 1e9
    for _ in range(8):
        start = time.process_time()
        a @ b
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def measure(case: Case, known: dict[str, Any], rounds: int, until: float) -> Iterator[dict[str, Any]]:
    """Adds rounds to `known` until there are enough or time is up. Yields all rounds after each."""
    arms = [a for a in case.arms if has_trl() or "trl" not in a]
    seconds: dict[str, list[float]] = {arm: known.get("seconds", {}).get(arm, []) for arm in arms}
    fork = get_context("fork")  # a process per arm; avoids importing everything again
    pipes: dict[str, Connection] = {}
    processes = []
    first = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for arm in arms:
                pipes[arm], theirs = fork.Pipe()
                processes.append(fork.Process(target=child, args=(arm, case, Path(folder) / "expected", theirs)))
                processes[-1].start()
                theirs.close()
                first[arm] = pipes[arm].recv()
                print(arm, first[arm], flush=True)
            peaks = known.get("matrix_peaks", [])
            while len(seconds[arms[-1]]) < rounds:
                peaks = [*peaks, matrix_peak(case.dtype)]
                for arm in arms:
                    pipes[arm].send(True)
                    seconds[arm].append(round(pipes[arm].recv(), 4))
                print({arm: values[-1] for arm, values in seconds.items()}, flush=True)
                yield {**asdict(case), **limits(case), "matrix_peaks": peaks, "seconds": seconds, "first": first}
                if time.monotonic() > until:
                    break
        finally:
            for process in processes:
                process.kill()
                process.join()


def summary(found: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """The matrix peak is the best of this dtype over all cases, since other load disturbs it too."""
    ours = statistics.median(found["seconds"]["shared"])
    peak = max(max(other["matrix_peaks"]) for other in results.values() if other["dtype"] == found["dtype"])
    arms = {}
    for arm, seconds in found["seconds"].items():
        median, first = statistics.median(seconds), found["first"][arm]
        arms[arm] = {
            "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
            "times_ours": round(median / ours, 3),
            "row_tokens_per_second": round(found["tokens_of_rows"] / median),
            # the case counts the triplet's FLOPs
            "share_of_matrix_peak": None
            if arm == "shared-pair"
            else round(found["least_gflops"] * 1e9 / peak / median, 3),
            "mib_over_weights": round(first["mib"]),
            "times_least_memory": round(first["mib"] / found["least_mib"], 2),
            "gradient_error": first["gradient_error"],
        }
    return {"rounds": len(found["seconds"]["shared"]), "matrix_peak_gflops": round(peak / 1e9, 1), "arms": arms}


def has_trl() -> bool:
    try:
        version("trl")
    except PackageNotFoundError:
        return False
    return True


def machine() -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}, bfloat16 products: " + (
        "yes" if has_bfloat16_products() else "no"
    )


def main() -> None:
    cases = all_cases()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a case, or a part of case names")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no round after this")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    until = time.monotonic() + 60 * arguments.minutes
    chosen = {arguments.only} & set(cases) or {name for name in cases if (arguments.only or "") in name}
    result = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {"results": {}}
    for name, case in cases.items():
        known = result["results"].get(name, {})
        rounds = min(case.rounds, arguments.rounds)
        if name not in chosen or len(known.get("seconds", {}).get("shared", [])) >= rounds:
            continue
        if time.monotonic() > until:
            break
        print(name, flush=True)
        packages = ("sparring", "torch", "transformers", *(["trl"] if has_trl() else []))
        result["machine"], result["versions"] = machine(), {package: version(package) for package in packages}
        for found in measure(case, known, rounds, until):
            results = result["results"] | {name: found}
            result["results"] = {key: {**one, "summary": summary(one, results)} for key, one in results.items()}
            arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
