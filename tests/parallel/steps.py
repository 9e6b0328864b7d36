"""Training steps on one rank or several, for `test_equal.py`: python steps.py MODEL PARALLEL STEPS OUT.

Every arm trains the same model on the same rows; OUT gets, per arm, the loss and gradient norm of each step.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from sparring.model.load import load_model
from sparring.model.logprobs import Scorer
from sparring.model.packing import Kind, group_tokens
from sparring.objectives import Spin
from sparring.parallel import distributed
from sparring.stages.train.loop import TrainingExample, forward_backward
from sparring.types import Group

BATCH = 16
ARMS: list[tuple[Kind, int]] = [("shared", 1), ("shared", 8), ("padded", 1), ("padded", 8)]
"""PackedBatch, and about how many micro-batches a rank of one cuts a step into."""


def make_plays(vocab: int, count: int = 64) -> list[TrainingExample]:
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


def begin(folder: Path, kind: Kind) -> tuple[torch.nn.Module, list[TrainingExample], Scorer, Any, Any]:
    model = load_model(folder, dtype=torch.float32, device=torch.device("cpu")).train()
    plays = make_plays(model.config.vocab_size)
    scorer, size = Scorer(model, kind=kind), sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-5)
    forward, optimizer = distributed.prepare(scorer, sorted(model._no_split_modules or ()), optimizer, 1.0)
    part = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in model.parameters())
    assert (part < size) == distributed.is_sharded()
    return model, plays, scorer, forward, optimizer


def run(folder: Path, kind: Kind, pieces: int, steps: int) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    _, plays, scorer, forward, optimizer = begin(folder, kind)
    found = []
    for step in range(steps):
        batch = [plays[(step * BATCH + i) % len(plays)] for i in range(BATCH)]
        tokens = sum(group_tokens(kind, play.group) for play in batch)
        metrics = forward_backward(
            scorer, Spin(lambda_=0.1), batch, 10**6 if pieces == 1 else tokens // pieces, 0.0, forward
        )
        found.append((metrics["loss"], distributed.update(forward, optimizer, 1.0)))
    return found


def after_nan(folder: Path) -> tuple[list[float], list[bool]]:
    """Gradient norms of a step, of one with an opponent's log-prob that is no number, and of another; and whether each
    left the weights as they were."""
    model, plays, scorer, forward, optimizer = begin(folder, "shared")
    poisoned = [replace(plays[0], opponent={**plays[0].opponent, "real": np.array(np.nan, dtype=np.float32)})]
    norms, unchanged = [], []
    for batch in (plays[:BATCH], poisoned + plays[1:BATCH], plays[:BATCH]):
        before = [distributed.whole(parameter).clone() for parameter in model.parameters()]
        forward_backward(scorer, Spin(lambda_=0.1), batch, 10**6, 0.0, forward)
        norms.append(distributed.update(forward, optimizer, 1.0))
        after = [distributed.whole(parameter) for parameter in model.parameters()]
        unchanged.append(all(torch.equal(one, other) for one, other in zip(before, after, strict=True)))
    return norms, unchanged


def divided_again(run: Callable[[], list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The control: the loss is divided by each rank's own examples, whose gradients are averaged."""
    backward = distributed.backward
    distributed.backward = lambda loss, scorer: backward(loss / distributed.num_ranks(), scorer)
    try:
        return run()
    finally:
        distributed.backward = backward


def main() -> None:
    folder, parallel, steps, out = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    distributed.join(parallel, 40.0)
    found: dict[str, Any] = {f"{kind}/{pieces}": run(folder, kind, pieces, steps) for kind, pieces in ARMS}
    assert distributed.is_sharded() == (parallel in ("fsdp2", "zero3"))
    found["after_nan"] = after_nan(folder)
    found["wrong"] = divided_again(lambda: run(folder, "shared", 1, 3))
    if distributed.is_first():
        out.write_text(json.dumps(found))
    distributed.meet()
    os._exit(0)


if __name__ == "__main__":
    main()
