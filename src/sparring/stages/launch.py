"""Where a stage runs: in this process, on ranks of this machine (torchrun), or on a Ray cluster.

This process owns the run and waits; the ranks run the stage, and the main rank commits it (this process commits
`generate`, whose ranks share nothing but the run directory). Both sides leave notes in `.ranks` of the run directory:
this one, that the user asked to stop; a rank, why it ended.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

from sparring.errors import RankLost, RunError, UserError
from sparring.logging import info
from sparring.model.memory import release_memory, return_freed_memory
from sparring.parallel import Parallel, SingleProcess, interrupt, num_local_devices, num_usable_cpus
from sparring.parallel.processes import guarded_process
from sparring.parallel.ray_cluster import ranks_on_ray
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.rundir import BENCHMARKS
from sparring.run.tracking import NO_TRACKER, Tracker, steps_before
from sparring.stages.evaluate import answer_questions, benchmark, evaluate
from sparring.stages.generate import backend_factory, generate, prepare_parts, write_dequantized_base
from sparring.stages.generate.ray_pool import generate_on_ray
from sparring.stages.score import score
from sparring.stages.train import train

MAX_LOSSES = 4
"""Ranks that a cluster may lose without a new checkpoint before the run stops."""
GRACE_SECONDS = 5.0
"""How long the other ranks have to end on their own after one has given its reason."""


def launch_stage(iteration: Iteration, stage: str, tracker: Tracker = NO_TRACKER) -> None:
    """Runs a stage where the recipe's `launch` says, and returns when it is committed.

    Whatever it held on a device is free then: the next stage may start an engine, in a process of its own, that wants
    nine tenths of the device.
    """
    try:
        _launch(iteration, stage, tracker)
    finally:
        release_memory()


def _launch(iteration: Iteration, stage: str, tracker: Tracker) -> None:
    launch = iteration.recipe.launch
    if stage not in ("score", "train"):
        write_dequantized_base(iteration)
    match stage:
        case "generate":
            if launch == "torchrun":
                run_on_ranks(iteration, stage)
            elif launch == "ray":
                generate_on_ray(iteration)
            generate(iteration, backend_factory(iteration))  # draws what is missing, and commits
        case "score" | "train" | "evaluate" if launch != "inline":
            run_on_ranks(iteration, stage, tracker)
        case "score" | "train" | "evaluate":
            run_here(iteration, stage, SingleProcess(), tracker)
        case _:
            name = stage.removeprefix(f"{BENCHMARKS}/")
            task = iteration.benchmarks[name]
            if task is None:
                answer_questions(iteration, backend_factory(iteration))
            else:
                benchmark(iteration, task, name)


def run_here(iteration: Iteration, stage: str, parallel: Parallel, tracker: Tracker = NO_TRACKER) -> None:
    """Runs a stage that can have several ranks in this process, which is one of them or alone."""
    return_freed_memory()
    match stage:
        case "score":
            score(iteration, parallel)
        case "train":
            train(iteration, parallel, tracker)
        case "evaluate":
            evaluate(iteration, backend_factory(iteration), parallel)
        case _:
            raise ValueError(stage)


def run_on_ranks(iteration: Iteration, stage: str, tracker: Tracker = NO_TRACKER) -> None:
    """Runs a stage on ranks until it is done; of `generate` the parts that are missing."""
    if stage == "generate":
        prepare_parts(iteration)
    work = iteration.run.work(iteration.stage(stage))
    losses, kept = 0, None
    while True:
        try:
            if _run_once(iteration, stage, tracker):
                return
            info(f"  Out of memory on a rank; {stage} restarts with smaller micro-batches.")
        except RankLost as loss:
            before, kept = kept, sorted(path.name for path in work.glob("step-*"))
            losses = losses + 1 if kept == before else 1
            if losses == MAX_LOSSES:
                raise
            info(f"note: {loss}; {stage} restarts from what is committed")


def _run_once(iteration: Iteration, stage: str, tracker: Tracker) -> bool:
    """Whether the stage is done; False if a rank ran out of memory and left a smaller micro-batch size."""
    notes = iteration.run.ranks
    shutil.rmtree(notes, ignore_errors=True)
    notes.mkdir()
    if stage == "evaluate":  # an attempt that ended leaves nothing to continue
        shutil.rmtree(iteration.run.work(iteration.stage(stage)), ignore_errors=True)
    follower = StepFollower(iteration, tracker) if stage == "train" else None
    worker = ["-m", "sparring.stages.worker", str(iteration.run.root), str(iteration.index), stage]
    with _started(iteration.recipe, stage, worker, notes / "ended") as ranks:
        _wait(ranks, notes, follower)
    reasons = _reasons(notes)
    shutil.rmtree(notes, ignore_errors=True)
    if follower is not None:
        follower.track()
    interrupt.stop_if_asked()
    if ranks.returncode == 0 and not reasons:
        return True
    for kind, message in reasons:
        if kind == "OutOfMemory":
            return False
        if kind == "UserError":
            raise UserError(message)
    reason = reasons[0][1] if reasons else f"the ranks ended with status {ranks.returncode}"
    if iteration.recipe.launch == "ray" and {kind for kind, _ in reasons} <= {"Ended", "RankLost"}:
        raise RankLost(reason)
    kept = {"generate": "its finished parts", "train": "its last checkpoint"}.get(stage, "the stages before it")
    raise RunError(
        f"{stage} of iteration {iteration.index} ended early: {reason}. Everything committed is intact ({kept}); the "
        "same command continues."
    )


@runtime_checkable
class Ranks(Protocol):
    """The processes of a stage as one."""

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...


def _wait(ranks: Ranks, notes: Path, follower: StepFollower | None) -> None:
    """Until the ranks have ended, or for a grace period after one has given its reason: leaving kills the others."""
    ended_at: float | None = None
    while ranks.poll() is None:
        time.sleep(0.1)
        if interrupt.is_asked():
            (notes / "stop").touch()
        if follower is not None:
            follower.track()
        if ended_at is None and (any(notes.glob("rank-*")) or (notes / "kept").exists()):
            ended_at = time.monotonic()
        if ended_at is not None and time.monotonic() - ended_at > GRACE_SECONDS:
            return


def _started(recipe: Recipe, stage: str, worker: Sequence[str], note: Path) -> AbstractContextManager[Ranks]:
    """The ranks, on this machine or on a cluster. Leaving the context kills those that still run."""
    num_processes = None if recipe.num_processes == "auto" else recipe.num_processes
    if recipe.launch == "ray":
        return ranks_on_ray(recipe.ray_address, num_processes, recipe.threads, worker, note)
    count = num_processes or num_local_devices()
    if stage == "generate":
        count = max(1, count // recipe.generate.tensor_parallel_size)
    threads = recipe.threads or max(1, num_usable_cpus() // count)
    torchrun = ["-m", "sparring.parallel.torchrun", str(count), str(threads), str(note)]
    return guarded_process([sys.executable, *torchrun, *worker])


def _reasons(notes: Path) -> list[tuple[str, str]]:
    """Why the ranks ended, as (kind, message), causes before consequences: losing another rank comes last."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(notes.glob("rank-*"))]
    found += [["Ended", path.read_text(encoding="utf-8")] for path in notes.glob("ended")]
    order = {"OutOfMemory": 0, "UserError": 1, "RunError": 2, "Ended": 4, "RankLost": 5}
    return sorted(((kind, message) for kind, message in found), key=lambda one: order.get(one[0], 3))


class StepFollower:
    """Follows the metrics.jsonl that ranks write, and sends each new step to the trackers."""

    def __init__(self, iteration: Iteration, tracker: Tracker) -> None:
        self.iteration, self.tracker = iteration, tracker
        self.work = iteration.run.work(iteration.stage("train"))
        self.earlier_steps = steps_before(iteration.run, iteration.index)
        self.last_step = max((int(path.name[5:]) for path in self.work.glob("step-*")), default=0)
        self.offset = 0

    def track(self) -> None:
        for line in self._new_lines():
            if line["step"] > self.last_step:
                self.last_step = int(line["step"])
                self.tracker.step(self.iteration, line, self.earlier_steps)

    def _new_lines(self) -> Iterator[dict[str, float]]:
        done = self.iteration.stage("train") / "metrics.jsonl"
        path = done if done.is_file() else self.work / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                # a rank that restarts replaces the file with its checkpoint's, which may be shorter, and appends
                file.seek(max(0, self.offset - 1))
                if self.offset and file.read(1) != b"\n":
                    self.offset = 0
                file.seek(self.offset)
                text = file.read()
        except OSError:
            return
        text = text[: text.rfind(b"\n") + 1]
        self.offset += len(text)
        yield from (json.loads(line) for line in text.splitlines())
