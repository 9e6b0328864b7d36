"""Ranks that are not there: a process group whose collectives return at once, for forecasts and tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fully_shard as fully_shard
from accelerate.state import AcceleratorState
from torch.distributed.device_mesh import init_device_mesh

from sparring.parallel.fsdp2 import Fsdp2
from sparring.parallel.rendezvous import Rendezvous

RANKS_PER_NODE = 8


class _Alone(Rendezvous):
    """The main rank's, without a store: nobody else arrives."""

    def __init__(self, num_ranks: int) -> None:
        self.rank, self.num_ranks, self.timeout = 0, num_ranks, timedelta(seconds=60)

    def barrier(self) -> None:
        pass


@contextmanager
def fake_fsdp2(num_ranks: int, dtype: torch.dtype) -> Iterator[Fsdp2]:
    """Rank 0 of `num_ranks` that shard a model, on nodes of eight. For fake tensors, with which it computes nothing.

    The process must have no process group. Enter `FakeTensorMode` within the block: a device mesh holds real numbers.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    local = min(num_ranks, RANKS_PER_NODE)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(local)}
    with patch.dict(os.environ, {**place, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}):
        dist.init_process_group("fake", rank=0, world_size=num_ranks, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (num_ranks,))
            with patch.object(fully_shard, "_init_default_mesh", lambda *_: mesh):
                yield Fsdp2(_Alone(num_ranks), dtype)
        finally:
            dist.destroy_process_group()
            AcceleratorState._reset_state(reset_partial_state=True)
