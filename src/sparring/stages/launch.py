"""Several processes for one stage, the ranks, as torchrun starts them, one per device of this machine.

Ours owns the run and waits; the ranks do the stage, and the first of them commits it (ours commits `generate`, whose
ranks share nothing but the run directory). In `.ranks` of the run directory both sides leave word: ours, that the user
asked to stop; a rank, why it ended.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from sparring.errors import RankLost, Refused, Stopped
from sparring.logging import say
from sparring.parallel import distributed, interrupt
from sparring.parallel.processes import guarded
from sparring.parallel.ray_cluster import RanksOnRay, ranks_on_ray
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.tracking import steps_before, track_step
from sparring.stages.generate import begin_parts

MAX_LOSSES = 4
"""Ranks that a cluster may lose without a checkpoint between before the run stops."""
SETTLE_SECONDS = 5.0
"""What the other ranks have to end by themselves after one has said why it did."""


def on_ranks(iteration: Iteration, stage: str) -> None:
    """Runs a stage on the ranks until it is done; of `generate` the parts that are missing."""
    if stage == "generate":
        begin_parts(iteration)
    losses, kept = 0, None
    while True:
        try:
            if _run(iteration, stage):
                return
            say(f"  the ranks of {stage} begin anew with less at a time")
        except RankLost as loss:
            before, kept = kept, sorted(path.name for path in iteration.run.work(iteration.stage(stage)).glob("step-*"))
            losses = losses + 1 if kept == before else 1
            if losses == MAX_LOSSES:
                raise
            say(f"note: {loss}: the ranks of {stage} begin anew from what is kept")


def _run(iteration: Iteration, stage: str) -> bool:
    """Whether the stage is done; False where memory ran out and less at a time is noted."""
    notes = iteration.run.ranks
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    if stage == "evaluate":  # of an attempt that ended nothing is continued
        shutil.rmtree(iteration.run.work(iteration.stage(stage)), ignore_errors=True)
    steps = _Steps(iteration) if stage == "train" else None
    rank = ["-m", "sparring.stages.worker", str(iteration.run.root), str(iteration.index), stage]
    silent_since: float | None = None
    with _starting(iteration.recipe, stage, rank, notes / "ended") as starter:
        while starter.poll() is None:
            time.sleep(0.1)
            if interrupt.is_asked():
                (notes / "stop").touch()
            if steps is not None:
                steps.track()
            if silent_since is None and (any(notes.glob("rank-*")) or (notes / "kept").exists()):
                silent_since = time.monotonic()
            if silent_since is not None and time.monotonic() - silent_since > SETTLE_SECONDS:
                break  # the guard ends those that hang
    said = _said(notes)
    shutil.rmtree(notes, ignore_errors=True)
    if steps is not None:
        steps.track()
    interrupt.stop_if_asked()
    if starter.returncode == 0 and not said:
        return True
    for kind, message in said:
        if kind == "OutOfMemory":
            return False
        if kind == "Refused":
            raise Refused(message)
    reason = said[0][1] if said else f"the ranks ended with status {starter.returncode}"
    if iteration.recipe.launch == "ray" and {kind for kind, _ in said} <= {"Ended", "RankLost"}:
        raise RankLost(reason)
    kept = "parts" if stage == "generate" else "checkpoint" if stage == "train" else "stages before it"
    raise Stopped(
        f"{stage} of iteration {iteration.index} ended before it was done: {reason}. What was committed is intact "
        f"({kept}); the same command continues"
    )


def _starting(
    recipe: Recipe, stage: str, rank: Sequence[str], note: Path
) -> AbstractContextManager[subprocess.Popen[bytes] | RanksOnRay]:
    """What starts the ranks, on this machine or on a cluster, and ends them when it is left."""
    if recipe.launch == "ray":
        return ranks_on_ray(recipe, rank, note)
    count = distributed.num_devices() if recipe.processes == "auto" else recipe.processes
    if stage == "generate":
        count = max(1, count // recipe.generate.tensor_parallel_size)
    threads = recipe.threads or max(1, (os.cpu_count() or 1) // count)
    return guarded([sys.executable, "-m", "sparring.parallel.torchrun", str(count), str(threads), str(note), *rank])


def _said(notes: Path) -> list[tuple[str, str]]:
    """What ended the ranks, as (kind, message), causes before consequences: a rank that lost another says so last."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(notes.glob("rank-*"))]
    found += [["Ended", path.read_text(encoding="utf-8")] for path in notes.glob("ended")]
    order = {"OutOfMemory": 0, "Refused": 1, "Stopped": 2, "Ended": 4, "RankLost": 5}
    return sorted(((kind, message) for kind, message in found), key=lambda one: order.get(one[0], 3))


class _Steps:
    """Follows metrics.jsonl of a training that others do, and tells the trackers of each new step."""

    def __init__(self, iteration: Iteration) -> None:
        self.iteration = iteration
        self.work = iteration.run.work(iteration.stage("train"))
        self.first = steps_before(iteration.run, iteration.index)
        self.told = max((int(path.name[5:]) for path in self.work.glob("step-*")), default=0)
        self.at = 0

    def track(self) -> None:
        for line in self.lines():
            if line["step"] > self.told:
                self.told = int(line["step"])
                track_step(line, self.first + self.told, self.iteration.index)

    def lines(self) -> Iterator[dict[str, float]]:
        done = self.iteration.stage("train") / "metrics.jsonl"
        path = done if done.is_file() else self.work / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                # what a rank that begins anew makes of the file is a checkpoint's, which may be shorter, and go on
                file.seek(max(0, self.at - 1))
                if self.at and file.read(1) != b"\n":
                    self.at = 0
                file.seek(self.at)
                text = file.read()
        except OSError:
            return
        text = text[: text.rfind(b"\n") + 1]
        self.at += len(text)
        yield from (json.loads(line) for line in text.splitlines())
