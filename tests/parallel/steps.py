"""Training steps on one rank or several, for `test_equal.py`: python steps.py MODEL PARALLEL STEPS OUT.

Every arm trains the same model on the same rows; OUT gets, per arm, the loss and gradient norm of each step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparring.model.load import load_model
from sparring.model.logprobs import Scorer
from sparring.model.packing import Packing, group_tokens, pack_shared
from sparring.objectives import Spin
from sparring.parallel import Parallel, ddp, rendezvous
from sparring.parallel.ddp import Ddp
from sparring.parallel.fsdp2 import Fsdp2
from sparring.parallel.rendezvous import Rendezvous, is_lost_rank
from sparring.stages.train.checkpoint import Checkpointer
from sparring.stages.train.policy import Policy
from sparring.stages.train.step import forward_backward
from sparring.types import Group, TrainingExample

BATCH = 16
ARMS: list[tuple[Packing, int]] = [("shared", 1), ("shared", 8), ("padded", 1), ("padded", 8)]
"""How rows are packed, and about how many micro-batches a single rank divides a step into."""


def make_examples(vocab: int, count: int = 64) -> list[TrainingExample]:
    random = np.random.default_rng(0)

    def tokens() -> np.ndarray:
        return random.integers(4, vocab, random.integers(2, 14)).astype(np.int32)

    return [
        TrainingExample(
            Group(str(i), tokens(), {"real": (tokens(),), "generated": (tokens(),)}),
            {"real": np.array(-30.0, dtype=np.float32), "generated": np.array([-31.0], dtype=np.float32)},
        )
        for i in range(count)
    ]


def make_policy(
    folder: Path,
    packing: Packing,
    parallel: Parallel,
    dtype: torch.dtype = torch.float32,
    *,
    is_stored_in_bfloat16: bool = False,
) -> Policy:
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu")).train()
    if is_stored_in_bfloat16:  # ranks that shard widen their shards, one process the whole model
        nn.Module.to(model, torch.bfloat16)
        nn.Module.to(model, torch.bfloat16 if parallel.is_sharded else torch.float32)
    scorer, size = Scorer(model, dtype, packing), sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-5)
    forward, optimizer = parallel.prepare(scorer, sorted(model._no_split_modules or ()), optimizer)
    part = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    assert (part < size) == parallel.is_sharded
    return Policy(model, scorer, forward, optimizer)


def run(
    folder: Path, packing: Packing, pieces: int, steps: int, parallel: Parallel, **stored: bool
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    policy = make_policy(folder, packing, parallel, **stored)
    examples = make_examples(policy.model.config.vocab_size)
    found = []
    for step in range(steps):
        batch = [examples[(step * BATCH + i) % len(examples)] for i in range(BATCH)]
        tokens = sum(group_tokens(packing, example.group) for example in batch)
        micro_batch_tokens = 10**6 if pieces == 1 else tokens // pieces
        metrics = forward_backward(policy, Spin(lambda_=0.1), batch, micro_batch_tokens, 0.0, parallel)
        found.append((metrics["loss"], parallel.optimizer_step(policy.forward, policy.optimizer, 1.0)))
    return found


def in_bfloat16(folder: Path, parallel: Parallel) -> tuple[float, list[list[str]]]:
    """Mean |log-prob - float32's| per token, and per call of a layer (dtype of its weights, of what reaches it)."""
    half = make_policy(folder, "shared", parallel, torch.bfloat16)
    single = Scorer(load_model(folder, dtype=torch.float32, device=torch.device("cpu")))
    examples = make_examples(half.model.config.vocab_size)[:BATCH]
    batch = pack_shared([example.group for example in examples])
    seen: list[list[str]] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append([str(next(layer.parameters()).dtype), str(inputs[0].dtype)])

    half.model.base_model.layers[-1].register_forward_pre_hook(note)
    difference = batch.sums(half.forward(batch).detach() - single(batch).detach())
    return float(difference.abs().sum() / sum(batch.distinct_lengths)), seen


def after_nan(folder: Path, parallel: Parallel) -> tuple[list[float], list[bool]]:
    """A step, one whose opponent's log-prob is NaN, and another step: gradient norms, and which changed no weight."""
    policy = make_policy(folder, "shared", parallel)
    examples = make_examples(policy.model.config.vocab_size)
    nan = {**examples[0].opponent, "real": np.array(np.nan, dtype=np.float32)}
    poisoned = [replace(examples[0], opponent=nan)]
    norms, unchanged = [], []
    for batch in (examples[:BATCH], poisoned + examples[1:BATCH], examples[:BATCH]):
        before = [parallel.local_rows(parameter).values.clone() for parameter in policy.model.parameters()]
        forward_backward(policy, Spin(lambda_=0.1), batch, 10**6, 0.0, parallel)
        norms.append(parallel.optimizer_step(policy.forward, policy.optimizer, 1.0))
        after = [parallel.local_rows(parameter).values for parameter in policy.model.parameters()]
        unchanged.append(all(torch.equal(one, other) for one, other in zip(before, after, strict=True)))
    return norms, unchanged


def with_local_mean(parallel: Ddp, run: Callable[[], list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Control: the loss is divided by the number of each rank's own examples, and gradients are averaged again."""
    backward = parallel.backward

    def divided(loss: Tensor) -> None:
        backward(loss / parallel.num_ranks)

    parallel.backward = divided  # type: ignore[method-assign]
    try:
        return run()
    finally:
        parallel.backward = backward  # type: ignore[method-assign]


def on_two_nodes(folder: Path, steps: int, work: Path) -> dict[str, Any]:
    """Ranks that shard within their node only: steps, the mesh, and a checkpoint that all have written."""
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    parallel = Fsdp2(Rendezvous(40.0))
    found: dict[str, Any] = {f"shared/{pieces}": run(folder, "shared", pieces, steps, parallel) for pieces in (1, 8)}
    policy = make_policy(folder, "shared", parallel)
    weight = next(policy.model.parameters())
    assert isinstance(weight, DTensor)
    found["mesh"] = weight.device_mesh.mesh.tolist()
    found["topology"] = parallel.topology
    parallel.limit_waits()
    if parallel.is_main:
        (work / "metrics.jsonl").touch()
    with Checkpointer(work, policy.model, policy.optimizer, work / "metrics.jsonl", parallel) as checkpoints:
        checkpoints.save(1)
        checkpoints.wait()
        parallel.barrier()
    whole = [parallel.gather_on_main(parameter) for parameter in policy.model.parameters()]
    assert all((tensor is not None) == parallel.is_main for tensor in whole), "nobody else copies them to CPU memory"
    found["num_parameters"] = sum(tensor.numel() for tensor in whole if tensor is not None)
    return found


def late(folder: Path) -> list[bool]:
    """Rank 1 comes late to `prepare`, to a collective of the first step, and to one of a later step: which were lost.

    The start's timeout is 2 s, a step's 1 s.
    """
    rendezvous.HEARTBEAT_SECONDS, ddp.START_TIMEOUT = 0.2, timedelta(seconds=2)
    parallel = Ddp(Rendezvous(1.0))
    found = []

    def is_lost(seconds: float, act: Callable[[], object]) -> bool:
        time.sleep(seconds * parallel.rank)
        try:
            act()
        except Exception as error:
            return is_lost_rank(error, 2)
        return False

    found.append(is_lost(3, lambda: make_policy(folder, "shared", parallel)))
    found.append(is_lost(1.5, lambda: parallel.all_reduce_sum(torch.ones(1))))
    parallel.limit_waits()
    found.append(is_lost(2, lambda: parallel.all_reduce_sum(torch.ones(1))))
    return found


def main() -> None:
    folder, name, steps, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    if name in ("two nodes", "late"):
        result = late(folder) if name == "late" else on_two_nodes(folder, steps, out.parent)
        if os.environ["RANK"] == "0":
            out.write_text(json.dumps(result))
        os._exit(0)
    parallel = {"ddp": Ddp, "fsdp2": Fsdp2}[name](Rendezvous(40.0))
    found: dict[str, Any] = {
        f"{packing}/{pieces}": run(folder, packing, pieces, steps, parallel) for packing, pieces in ARMS
    }
    assert parallel.is_sharded == (name == "fsdp2")
    found["after_nan"] = after_nan(folder, parallel)
    if name == "fsdp2":
        found["stored_in_bfloat16"] = run(folder, "shared", 1, 3, parallel, is_stored_in_bfloat16=True)
        AcceleratorState._reset_state()
        found["in_bfloat16"] = in_bfloat16(folder, Fsdp2(parallel.rendezvous, torch.bfloat16))
        AcceleratorState._reset_state()
        found["offloaded"] = run(folder, "shared", 1, 3, Fsdp2(parallel.rendezvous, offload=True))
    found["wrong"] = with_local_mean(parallel, lambda: run(folder, "shared", 1, 3, parallel))
    if parallel.is_main:
        out.write_text(json.dumps(found))
    parallel.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
