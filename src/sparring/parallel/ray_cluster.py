"""The ranks of a stage on a Ray cluster: an actor for each starts the program that torchrun starts on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparring.errors import Stopped
from sparring.logging import say
from sparring.parallel.torchrun import STARTER
from sparring.recipe.schema import Recipe
from sparring.stages.generate.ray_pool import PATIENCE_SECONDS, connected, per_device


class Place:
    """The actor: a place on some node, for one rank, whose process dies with it."""

    def take(self, *, is_first: bool) -> tuple[str, str, int]:
        """Node and address of this place; on the first one, with the port of the store that all ranks meet at."""
        import ray
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        address, port = ray.util.get_node_ip_address(), 0
        if is_first:
            self.store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
            port = self.store.port
        return ray.get_runtime_context().get_node_id(), address, port

    def run(self, words: Sequence[str], environment: dict[str, str]) -> int:
        started = {**os.environ, **environment, STARTER: str(os.getpid())}
        return subprocess.Popen([sys.executable, *words], env=started).wait()  # noqa: S603  (the words are ours)


class RanksOnRay:
    """To whoever waits it looks like the program that starts the ranks of one machine: `poll` and `returncode`."""

    def __init__(self, ray: Any, recipe: Recipe, words: Sequence[str], note: Path) -> None:
        self.ray = ray
        self.words = words
        self.note = note
        amounts = per_device(recipe)
        total = ray.cluster_resources()
        fit = min(int(total.get(name, 0) // count) for name, count in amounts.items())
        self.count = fit if recipe.processes == "auto" else recipe.processes
        if not self.count:
            raise Stopped(f"the cluster has no node with {amounts} for a rank; the same command continues")
        self.threads = recipe.threads or int(amounts.get("CPU", 1))
        kind = ray.remote(Place).options(
            num_cpus=amounts.get("CPU", 0),
            num_gpus=amounts.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy="SPREAD",
        )
        self.places = [kind.remote() for _ in range(self.count)]
        self.taken = [place.take.remote(is_first=number == 0) for number, place in enumerate(self.places)]
        self.nodes: list[str] = []  # of each rank, once all have a place
        self.runs: list[Any] = []
        self.returncode: int | None = None
        self.polls_without_place = 0

    def poll(self) -> int | None:
        from ray.exceptions import RayActorError

        number = 0
        try:
            if not self.runs:
                self._start()
            for number, run in enumerate(self.runs):
                if self.returncode is None and self.ray.wait([run], timeout=0)[0] and (status := self.ray.get(run)):
                    self._ended(number, status)
        except RayActorError:
            self._ended(number, None)
        if self.returncode is None and self.runs and len(self._done()) == self.count:
            self.returncode = 0
        return self.returncode

    def _done(self) -> list[Any]:
        return self.ray.wait(self.runs, num_returns=self.count, timeout=0)[0]

    def _start(self) -> None:
        """Ranks start together, when each has its place."""
        ready, _ = self.ray.wait(self.taken, num_returns=self.count, timeout=0)
        if len(ready) < self.count:
            self.polls_without_place += 1
            if self.polls_without_place == PATIENCE_SECONDS * 10:
                say(f"  waiting for the cluster to have places for {self.count} ranks; {len(ready)} are there")
            return
        found = self.ray.get(self.taken)
        self.nodes = [node for node, _, _ in found]
        _, address, port = found[0]
        common = {
            "WORLD_SIZE": str(self.count),
            "LOCAL_RANK": "0",  # Ray shows each place its own device alone
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(self.threads),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there already, as torchrun's is
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        self.runs = [
            place.run.remote(self.words, {**common, "RANK": str(number)}) for number, place in enumerate(self.places)
        ]

    def _ended(self, number: int, status: int | None) -> None:
        self.returncode = 1
        if status is None:
            self.note.write_text(f"rank {number} was lost, with its node or alone", encoding="utf-8")
        elif status != 1:  # one that ends with 1 has said why by itself
            how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
            self.note.write_text(f"rank {number} {how}", encoding="utf-8")

    def close(self) -> None:
        for place in self.places:
            self.ray.kill(place)


@contextmanager
def ranks_on_ray(recipe: Recipe, words: Sequence[str], note: Path) -> Iterator[RanksOnRay]:
    with connected(recipe.address) as ray:
        ranks = RanksOnRay(ray, recipe, words, note)
        try:
            yield ranks
        finally:
            ranks.close()
