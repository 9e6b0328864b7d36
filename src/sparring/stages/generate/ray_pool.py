"""The generate stage on a Ray cluster: actors run engines, and only this process commits their parts.

Exactly once: the owner of the run directory commits a part, under the name that its rows determine, when its responses
have arrived. A part that a dead actor was working on never arrives, and goes to another actor.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparring.data.tables import write_generations
from sparring.errors import RunError, UserError
from sparring.logging import info, track
from sparring.model.load import load_tokenizer
from sparring.parallel import interrupt
from sparring.parallel.ray_cluster import (
    PATIENCE_SECONDS,
    connected,
    make_actor,
    num_fitting,
    resources_per_device,
)
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit_part, has_part
from sparring.stages.generate import backend_factory, draw_parts, plan_parts, prepare_parts
from sparring.types import Generation, OpenBackend, Prompt

POLL_SECONDS = 1.0
"""How often the cluster's size is checked while nothing arrives."""
MAX_DEATHS = 4
"""Engines that may die on one part, or per worker without a finished part, before the run stops."""

Drawn = tuple[list[Generation], list[str]]


class Engine:
    """The actor: an engine on some node. It needs the model's folder there, and nothing else of the run."""

    def open(self, open_backend: OpenBackend, model: Path, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.tokenizer = load_tokenizer(model)
        self.backend = ExitStack().enter_context(open_backend(model))  # open until the process ends

    def draw(self, parts: Sequence[Sequence[Prompt]]) -> Iterator[Drawn]:
        """Streams each part as it is finished, while the engine works on the next one."""
        yield from draw_parts(self.backend, self.tokenizer, parts)


@dataclass
class Worker:
    actor: Any
    waits_for: Any  # Ray reference to its next event: the engine is open, or the next part is finished
    stream: Any = None
    lease: deque[Path] = field(default_factory=deque[Path])  # its parts, the current one first


def generate_on_ray(iteration: Iteration) -> None:
    """Samples the missing parts of the generate stage. A part does not depend on the engine that samples it.

    The pool follows the cluster: nodes that join get engines, and parts of nodes that leave go to other engines.
    """
    prepare_parts(iteration)
    missing = {path: wanted for path, wanted in plan_parts(iteration).items() if not has_part(path)}
    if missing:
        with connected(iteration.recipe.ray_address) as ray:
            pool = Pool(ray, iteration, missing)
            try:
                pool.work()
            finally:
                pool.close()


class Pool:
    """Engines on the cluster, and the parts that are missing."""

    def __init__(self, ray: Any, iteration: Iteration, missing: dict[Path, list[Prompt]]) -> None:
        self.ray = ray
        self.recipe = iteration.recipe
        self.opening = (backend_factory(iteration), iteration.opponent, iteration.recipe.threads)
        self.what = f"generate {iteration.index}"
        self.missing = missing  # parts that are not committed
        self.todo = deque(missing)  # of those, the unassigned ones
        self.workers: list[Worker] = []
        self.deaths: Counter[Path | None] = Counter()

    def work(self) -> None:
        idle = 0.0
        with track(self.what, sum(map(len, self.missing.values()))) as advance:
            while self.missing:
                if not interrupt.is_asked():
                    self.grow()
                elif not any(worker.lease for worker in self.workers):
                    interrupt.stop_if_asked()
                ready, _ = self.ray.wait([w.waits_for for w in self.workers], num_returns=1, timeout=POLL_SECONDS)
                idle = 0.0 if ready or any(w.lease for w in self.workers) else idle + POLL_SECONDS
                if idle == PATIENCE_SECONDS:
                    info(f"  {self.what}: waiting for {engine_resources(self.recipe)} to be free for an engine")
                for worker in [w for w in self.workers if w.waits_for in ready]:
                    self.handle_event(worker, advance)

    def grow(self) -> None:
        """Starts one engine more than the cluster has room for: an autoscaler acts on unmet demand."""
        resources = engine_resources(self.recipe)
        wanted = self.recipe.num_processes
        if wanted == "auto":
            wanted = 1 + num_fitting(self.ray, resources)
        num_busy = sum(bool(worker.lease) for worker in self.workers)
        for _ in range(len(self.workers), min(wanted, num_busy + len(self.todo))):
            actor = make_actor(self.ray, Engine, resources)
            self.workers.append(Worker(actor, actor.open.remote(*self.opening)))

    def handle_event(self, worker: Worker, advance: Any) -> None:
        """Commits a finished part, and assigns new parts to an idle worker."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            if worker.stream is None:
                self.ray.get(worker.waits_for)
            else:
                drawn = self.ray.get(next(worker.stream))
                self.commit(worker.lease[0], drawn, advance)
                worker.lease.popleft()
                if interrupt.is_asked():
                    worker.lease.clear()  # its current part is committed; the rest waits for the next start
        except StopIteration:
            pass
        except RayActorError as death:
            self.handle_death(worker, death)
            return
        except RayTaskError as error:
            if isinstance(error.cause, (UserError, RunError)):
                raise error.cause from None
            raise
        if not worker.lease:
            self.assign_parts(worker)

    def commit(self, path: Path, drawn: Drawn, advance: Any) -> None:
        answers, texts = drawn
        commit_part(path, lambda p: write_generations(p, answers, texts))
        advance(len(self.missing.pop(path)), sum(len(answer.token_ids) for answer in answers))
        self.deaths[None] = 0

    def assign_parts(self, worker: Worker) -> None:
        """Assigns many parts at first and few at the end: engines drain between leases, and should finish together."""
        count = 0 if interrupt.is_asked() else -(-len(self.todo) // (2 * len(self.workers)))
        if not count:
            self.workers.remove(worker)
            self.ray.kill(worker.actor)
            return
        worker.lease = deque(self.todo.popleft() for _ in range(count))
        parts = [self.missing[path] for path in worker.lease]
        worker.stream = worker.actor.draw.options(num_returns="streaming").remote(parts)
        worker.waits_for = worker.stream

    def handle_death(self, worker: Worker, death: Exception) -> None:
        """Returns the parts of a dead worker, unless a part keeps killing engines, or all engines die at start."""
        self.workers.remove(worker)
        self.ray.kill(worker.actor)
        at = worker.lease[0] if worker.lease else None
        self.todo.extendleft(reversed(worker.lease))
        self.deaths[at] += 1
        reason = " ".join(str(death).split())
        if self.deaths[at] >= MAX_DEATHS * (1 if at else len(self.workers) + 1):
            where = f"{at.name}" if at else "starting"
            raise RunError(
                f"{self.deaths[at]} engines died at {where} without finishing a part. The last one: {reason}"
            )
        info(f"note: an engine died; its {len(worker.lease)} parts go to others. {reason}")

    def close(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker.actor)


def engine_resources(recipe: Recipe) -> dict[str, float]:
    """What an engine reserves on a node: its devices, or a CPU for requests to a server that runs elsewhere."""
    if recipe.generate.url is not None:
        return {"CPU": 1.0}
    per_device = resources_per_device(recipe.threads)
    return {name: count * recipe.generate.tensor_parallel_size for name, count in per_device.items()}
