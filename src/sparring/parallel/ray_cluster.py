"""Ray: connecting to a cluster, and the ranks of a stage on it. One actor per rank starts that rank's process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparring.errors import RunError, UserError
from sparring.logging import info
from sparring.parallel.torchrun import LAUNCHER_PID

PATIENCE_SECONDS = 60.0
"""After waiting this long for free resources, a message says so."""


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """Ray, connected to the cluster at `address`, or to a local one."""
    try:
        import ray
    except ImportError as error:
        raise UserError("launch: ray needs Ray here and on every node. Run pip install 'sparring[ray]'.") from error
    is_ours = not ray.is_initialized()
    if is_ours:
        if address is not None and address != "auto":
            check_reachable(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        is_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, include_dashboard=None if address else False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"ray_address: no Ray cluster answers at {address or 'RAY_ADDRESS'}: {error}") from error
        if is_main_thread:
            signal.signal(signal.SIGTERM, before)  # Ray installs its own handler; ours commits work in progress
    try:
        yield ray
    finally:
        if is_ours:
            ray.shutdown()


def check_reachable(address: str) -> None:
    """Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UserError(f"ray_address: '{address}' is not an address. Write HOST:PORT of the head node, or auto.")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"ray_address: no Ray cluster answers at {address}: {error}") from error


def resources_per_device(threads: int | None) -> dict[str, float]:
    """A GPU, or, on a cluster without GPUs, as many CPUs as threads."""
    import ray

    return {"GPU": 1.0} if ray.cluster_resources().get("GPU") else {"CPU": float(threads or 1)}


def num_fitting(ray: Any, resources: Mapping[str, float]) -> int:
    """How many actors with these resources the cluster could hold if it were idle."""
    total = ray.cluster_resources()
    return min(int(total.get(name, 0) // count) for name, count in resources.items())


def make_actor(ray: Any, actor: type, resources: Mapping[str, float], **options: Any) -> Any:
    """A handle to a new actor, which Ray neither restarts nor retries: losses are handled here."""
    remote = ray.remote(actor).options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        max_restarts=0,
        max_task_retries=0,
        **options,
    )
    return remote.remote()


def order_by_node(nodes: Sequence[str]) -> tuple[list[int], int]:
    """The actors, whose nodes these are, in the order of their ranks, and how many of them share a node.

    Ranks of a node are neighbors, since FSDP2 shards within nodes. Actor 0 stays the main rank. If nodes have different
    numbers of actors, all count as one node.
    """
    counts = Counter(nodes)
    place = {node: number for number, node in enumerate(counts)}
    order = sorted(range(len(nodes)), key=lambda index: place[nodes[index]])
    return order, counts[nodes[0]] if len(set(counts.values())) == 1 else len(nodes)


class RankActor:
    """An actor that reserves resources for one rank on some node. The rank's process dies with it."""

    def reserve(self, *, is_main: bool) -> tuple[str, str, int]:
        """(node id, address, port): the main rank's has the port of the store where all ranks meet."""
        import ray
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        address, port = ray.util.get_node_ip_address(), 0
        if is_main:
            self.store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
            port = self.store.port
        return ray.get_runtime_context().get_node_id(), address, port

    def run(self, arguments: Sequence[str], environment: dict[str, str]) -> int:
        env = {**os.environ, **environment, LAUNCHER_PID: str(os.getpid())}
        return subprocess.Popen([sys.executable, *arguments], env=env).wait()  # noqa: S603  (the words are ours)


class RayRanks:
    """The ranks of a stage on a cluster. Has `poll` and `returncode`, like the process that torchrun is locally."""

    def __init__(
        self, ray: Any, num_processes: int | None, threads: int | None, arguments: Sequence[str], note: Path
    ) -> None:
        self.ray = ray
        self.arguments = arguments
        self.note = note
        resources = resources_per_device(threads)
        self.count = num_processes or num_fitting(ray, resources)
        if not self.count:
            raise RunError(f"No node of the cluster has {resources} for a rank. The same command continues.")
        self.threads = threads or int(resources.get("CPU", 1))
        self.actors = [make_actor(ray, RankActor, resources, scheduling_strategy="SPREAD") for _ in range(self.count)]
        self.reservations = [actor.reserve.remote(is_main=rank == 0) for rank, actor in enumerate(self.actors)]
        self.nodes: list[str] = []  # of each rank, once all have their resources
        self.runs: list[Any] = []
        self.returncode: int | None = None
        self.polls_waiting = 0

    def poll(self) -> int | None:
        from ray.exceptions import RayActorError

        rank = 0
        try:
            if not self.runs:
                self._start()
            for rank, run in enumerate(self.runs):
                if self.returncode is None and self.ray.wait([run], timeout=0)[0] and (status := self.ray.get(run)):
                    self._record_end(rank, status)
        except RayActorError:
            self._record_end(rank, None)
        if self.returncode is None and self.runs and len(self._finished()) == self.count:
            self.returncode = 0
        return self.returncode

    def _finished(self) -> list[Any]:
        return self.ray.wait(self.runs, num_returns=self.count, timeout=0)[0]

    def _start(self) -> None:
        """Starts all ranks together, once each has its resources."""
        ready, _ = self.ray.wait(self.reservations, num_returns=self.count, timeout=0)
        if len(ready) < self.count:
            self.polls_waiting += 1
            if self.polls_waiting == PATIENCE_SECONDS * 10:
                info(f"  Waiting for the cluster to have resources for {self.count} ranks; {len(ready)} are ready.")
            return
        reserved = self.ray.get(self.reservations)
        order, ranks_per_node = order_by_node([node for node, _, _ in reserved])
        self.actors = [self.actors[index] for index in order]
        self.nodes = [reserved[index][0] for index in order]
        _, address, port = reserved[0]
        common = {
            "WORLD_SIZE": str(self.count),
            "LOCAL_RANK": "0",  # Ray shows each actor its own device only
            "LOCAL_WORLD_SIZE": str(ranks_per_node),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(self.threads),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store exists already, as torchrun's does
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        self.runs = [
            actor.run.remote(self.arguments, {**common, "RANK": str(rank)}) for rank, actor in enumerate(self.actors)
        ]

    def _record_end(self, rank: int, status: int | None) -> None:
        self.returncode = 1
        if status is None:
            self.note.write_text(f"rank {rank} was lost, alone or with its node", encoding="utf-8")
        elif status != 1:  # a rank that exits with 1 has given its reason
            how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
            self.note.write_text(f"rank {rank} {how}", encoding="utf-8")

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)


@contextmanager
def ranks_on_ray(
    address: str | None, num_processes: int | None, threads: int | None, arguments: Sequence[str], note: Path
) -> Iterator[RayRanks]:
    """Starts `python ARGUMENTS` as ranks on a cluster; None for `num_processes`: as many as it has devices."""
    with connected(address) as ray:
        ranks = RayRanks(ray, num_processes, threads, arguments, note)
        try:
            yield ranks
        finally:
            ranks.close()
