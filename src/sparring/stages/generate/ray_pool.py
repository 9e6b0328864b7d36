"""The generate stage on a Ray cluster: actors hold engines, this process alone commits what they draw.

Exactly once: a part is committed by the owner of the run directory, under the name that its rows decide, when its
answers have arrived; what a dead actor was drawing never arrives, and is handed to another one.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparring.data.tables import write_generations
from sparring.errors import Refused, Stopped
from sparring.logging import say, track
from sparring.model.load import load_tokenizer
from sparring.parallel import interrupt
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit_part, has_part
from sparring.stages.generate import begin_parts, draw_parts, engine_of, parts_of
from sparring.types import Generation, OpenBackend, Prompt

POLL_SECONDS = 1.0
"""How often the cluster is asked for its size while nothing arrives."""
PATIENCE_SECONDS = 60.0
"""After so long without a place for any engine, a person is told."""
MAX_DEATHS = 4
"""Engines that may die at one part, or each in its place without any part between, before the run stops."""

Drawn = tuple[list[Generation], list[str]]


class Engine:
    """The actor: an engine on some node. It needs the model's folder there, and nothing else of the run."""

    def open(self, open_backend: OpenBackend, model: Path, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.tokenizer = load_tokenizer(model)
        self.backend = ExitStack().enter_context(open_backend(model))  # held until the process ends

    def draw(self, parts: Sequence[Sequence[Prompt]]) -> Iterator[Drawn]:
        """Streams each part as it is done, while the engine goes on with the next one."""
        yield from draw_parts(self.backend, self.tokenizer, parts)


@dataclass
class Worker:
    actor: Any
    waits_for: Any  # a reference to its next event: that it is open, or the next part of its stream
    stream: Any = None
    lease: deque[Path] = field(default_factory=deque[Path])  # handed out to it, the one being drawn first


def draw_on_cluster(iteration: Iteration) -> None:
    """Draws the parts of the generate stage that are missing. A part is the same whichever engine draws it.

    The pool follows the cluster: nodes that join get engines, and what was under way on nodes that leave is drawn
    again elsewhere.
    """
    begin_parts(iteration)
    missing = {path: wanted for path, wanted in parts_of(iteration).items() if not has_part(path)}
    if missing:
        with connected(iteration.recipe.address) as ray:
            pool = Pool(ray, iteration, missing)
            try:
                pool.work()
            finally:
                pool.close()


class Pool:
    """Engines on the cluster, and the parts that they have not drawn yet."""

    def __init__(self, ray: Any, iteration: Iteration, missing: dict[Path, list[Prompt]]) -> None:
        self.ray = ray
        self.recipe = iteration.recipe
        self.opening = (engine_of(iteration), iteration.opponent, iteration.recipe.threads)
        self.what = f"generate {iteration.index}"
        self.missing = missing  # what is not committed yet
        self.todo = deque(missing)  # of them, what is not handed out
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
                    say(f"  {self.what}: waiting for the cluster to have {needs(self.recipe)} free for an engine")
                for worker in [w for w in self.workers if w.waits_for in ready]:
                    self.hear(worker, advance)

    def grow(self) -> None:
        """One engine more than the cluster has room for: its demand is what an autoscaler acts on."""
        if self.recipe.processes == "auto":
            total, per_engine = self.ray.cluster_resources(), needs(self.recipe)
            wanted = 1 + min(int(total.get(name, 0) // count) for name, count in per_engine.items())
        else:
            wanted = self.recipe.processes
        amounts = needs(self.recipe)
        num_busy = sum(bool(worker.lease) for worker in self.workers)
        for _ in range(len(self.workers), min(wanted, num_busy + len(self.todo))):
            remote = self.ray.remote(Engine).options(
                num_cpus=amounts.get("CPU", 0), num_gpus=amounts.get("GPU", 0), max_restarts=0, max_task_retries=0
            )
            actor = remote.remote()
            self.workers.append(Worker(actor, actor.open.remote(*self.opening)))

    def hear(self, worker: Worker, advance: Any) -> None:
        """Takes what a worker has to say, commits it, and gives it something new to do when it is done."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            if worker.stream is None:
                self.ray.get(worker.waits_for)
            else:
                drawn = self.ray.get(next(worker.stream))
                self.commit(worker.lease[0], drawn, advance)
                worker.lease.popleft()
                if interrupt.is_asked():
                    worker.lease.clear()  # the part that it was drawing is kept; what was to follow is for another day
        except StopIteration:
            pass
        except RayActorError as death:
            self.bury(worker, death)
            return
        except RayTaskError as error:
            if isinstance(error.cause, (Refused, Stopped)):
                raise error.cause from None
            raise
        if not worker.lease:
            self.hand_out(worker)

    def commit(self, path: Path, drawn: Drawn, advance: Any) -> None:
        answers, texts = drawn
        commit_part(path, lambda p: write_generations(p, answers, texts))
        advance(len(self.missing.pop(path)), sum(len(answer.token_ids) for answer in answers))
        self.deaths[None] = 0

    def hand_out(self, worker: Worker) -> None:
        """Many parts at first, few at the end: an engine drains between leases, and none should be last by much."""
        count = 0 if interrupt.is_asked() else -(-len(self.todo) // (2 * len(self.workers)))
        if not count:
            self.workers.remove(worker)
            self.ray.kill(worker.actor)
            return
        worker.lease = deque(self.todo.popleft() for _ in range(count))
        parts = [self.missing[path] for path in worker.lease]
        worker.stream = worker.actor.draw.options(num_returns="streaming").remote(parts)
        worker.waits_for = worker.stream

    def bury(self, worker: Worker, death: Exception) -> None:
        """What it was drawing is drawn elsewhere, unless engines die of it again and again, or all at starting."""
        self.workers.remove(worker)
        self.ray.kill(worker.actor)
        at = worker.lease[0] if worker.lease else None
        self.todo.extendleft(reversed(worker.lease))
        self.deaths[at] += 1
        reason = " ".join(str(death).split())
        if self.deaths[at] >= MAX_DEATHS * (1 if at else len(self.workers) + 1):
            where = f"{at.name}" if at else "starting"
            raise Stopped(f"{self.deaths[at]} engines died at {where}, without a part between. The last one: {reason}")
        say(f"note: an engine died; {len(worker.lease)} parts that it had are drawn by others. {reason}")

    def close(self) -> None:
        for worker in self.workers:
            self.ray.kill(worker.actor)


def needs(recipe: Recipe) -> dict[str, float]:
    """What of a node an engine takes: devices as vLLM counts them; requests to a server that runs elsewhere a CPU."""
    if recipe.generate.url is not None:
        return {"CPU": 1.0}
    amounts = per_device(recipe)
    return {name: count * recipe.generate.tensor_parallel_size for name, count in amounts.items()}


def per_device(recipe: Recipe) -> dict[str, float]:
    """A GPU, or where the cluster has none as many CPUs as the recipe has threads."""
    import ray

    return {"GPU": 1.0} if ray.cluster_resources().get("GPU") else {"CPU": float(recipe.threads or 1)}


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or to one of this machine alone."""
    try:
        import ray
    except ImportError as error:
        raise Refused("launch: ray needs Ray here and on every node; pip install 'sparring[ray]'") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        if address is not None and address != "auto":
            knock(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        listens = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, include_dashboard=None if address else False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise Refused(f"address: no Ray cluster answers at {address or 'RAY_ADDRESS'}: {error}") from error
        if listens:
            signal.signal(signal.SIGTERM, before)  # Ray puts its own there: ours finishes what is under way
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()


def knock(address: str) -> None:
    """Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise Refused(f"address: '{address}' is none of a Ray cluster; write HOST:PORT of its head node, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise Refused(f"address: no Ray cluster answers at {address}: {error}") from error
