"""Where ranks meet outside of torch's collectives: a key-value store, heartbeats, and waiting without a deadline.

torch's own collectives give up after a fixed time. A rank that writes a checkpoint may be late by minutes, and a rank
that died should be noticed in seconds: so ranks wait here for as long as the missing ones send heartbeats.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from sparring.errors import RankLost

HEARTBEAT_SECONDS = 2.0
POLL_SECONDS = 0.05

LOST_RANK_MESSAGES = (
    *("imed out", "timeout", "Connection closed", "Connection reset", "Broken pipe", "NCCL error", "gloo", "ocket"),
)
"""Parts of what the backends' errors say when another rank has died or does not answer."""


class Rendezvous:
    """The store of a launcher such as torchrun, which outlives every rank. Made once per rank, when it starts."""

    def __init__(self, timeout_seconds: float) -> None:
        """Joins, starts the heartbeat, and returns when all ranks have joined.

        `timeout_seconds`: how long a rank may miss heartbeats before the others give it up.
        """
        self.rank = int(os.environ["RANK"])
        self.num_ranks = int(os.environ["WORLD_SIZE"])
        self.timeout = timedelta(seconds=timeout_seconds)
        self._num_calls = 0
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = PrefixStore("sparring", TCPStore(address, port, is_master=False, timeout=self.timeout))
        threading.Thread(target=self._send_heartbeats, daemon=True).start()
        self._store.add("started", 1)
        while self._store.add("started", 0) < self.num_ranks:  # some ranks take longer to start than others
            time.sleep(POLL_SECONDS)

    def barrier(self) -> None:
        if self.num_ranks > 1:
            key = self._next_key("barrier")
            self._store.add(key, 1)
            self._wait(lambda: self._store.add(key, 0) == self.num_ranks)

    def broadcast_from_main(self, text: Callable[[], str]) -> str:
        if self.num_ranks == 1:
            return text()
        key = self._next_key("broadcast")
        if self.rank == 0:
            self._store.set(key, text())
        self._wait(lambda: self._store.check([key]))
        return self._store.get(key).decode()

    def _next_key(self, kind: str) -> str:
        """Ranks make the same calls in the same order, so they agree on the key."""
        self._num_calls += 1
        return f"{kind}-{self._num_calls}"

    def _wait(self, is_done: Callable[[], bool]) -> None:
        """Waits for as long as every rank's heartbeat count keeps growing."""
        seen: dict[int, tuple[int, float]] = {}
        while not is_done():
            now = time.monotonic()
            for other in range(self.num_ranks):
                count = self._store.add(f"heartbeat-{other}", 0)
                if other not in seen or seen[other][0] != count:
                    seen[other] = (count, now)
                elif now - seen[other][1] > self.timeout.total_seconds():
                    raise RankLost(f"rank {other} sent no heartbeat for {self.timeout.total_seconds():g} seconds")
            time.sleep(POLL_SECONDS)

    def _send_heartbeats(self) -> None:
        while True:
            self._store.add(f"heartbeat-{self.rank}", 1)
            time.sleep(HEARTBEAT_SECONDS)


def is_lost_rank(error: BaseException, num_ranks: int) -> bool:
    """Whether an error says that another rank died, or did not reach a collective."""
    return isinstance(error, (RankLost, dist.DistError)) or (
        isinstance(error, RuntimeError)
        and num_ranks > 1
        and any(message in str(error) for message in LOST_RANK_MESSAGES)
    )
