"""Data parallelism: each rank holds the whole model, and gradients are averaged. Through accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from sparring.parallel.protocol import LocalRows
from sparring.parallel.rendezvous import Rendezvous

START_TIMEOUT = timedelta(minutes=10)
"""How long a collective waits until the first step is done: ranks connect and compile at different speeds."""


class Ddp:
    """`Parallel` for ranks that each hold the whole model."""

    name = "ddp"

    def __init__(self, rendezvous: Rendezvous, **accelerator_settings: Any) -> None:
        self.rendezvous = rendezvous
        self.accelerator = Accelerator(
            mixed_precision="no",  # autocast is the scorer's, so that scoring and training share one code path
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=max(START_TIMEOUT, rendezvous.timeout)),
                # otherwise torch reorders its buckets after the first step of each start, and a resumed run of three
                # or more ranks would sum gradients in another order than one that was never stopped
                DistributedDataParallelKwargs(find_unused_parameters=True),
            ],
            **accelerator_settings,
        )

    @property
    def rank(self) -> int:
        return self.rendezvous.rank

    @property
    def num_ranks(self) -> int:
        return self.rendezvous.num_ranks

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_sharded(self) -> bool:
        return False

    @property
    def topology(self) -> str:
        return f"{self.num_ranks} x {self.name}" if self.num_ranks > 1 else "1"

    def prepare(self, module: nn.Module, blocks: Sequence[str], optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        self.barrier()  # without a deadline: one rank may have loaded the model minutes after another
        self.accelerator.free_memory()  # of what was prepared before
        wrapped, wrapped_optimizer = self.accelerator.prepare(module, optimizer)
        return wrapped, wrapped_optimizer

    def unwrap(self, optimizer: Optimizer) -> Optimizer:
        return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer

    def accumulate(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext() if is_last else self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def optimizer_step(self, module: nn.Module, optimizer: Optimizer, max_norm: float | None) -> float:
        clipped = self.accelerator.clip_grad_norm_(module.parameters(), max_norm or math.inf)
        assert clipped is not None
        norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def limit_waits(self) -> None:
        mesh = self.accelerator.torch_device_mesh
        for group in (dist.group.WORLD, *(mesh.get_all_groups() if mesh is not None else ())):
            _set_pg_timeout(self.rendezvous.timeout, group)

    def gather_on_main(self, tensor: Tensor) -> Tensor | None:
        tensor = tensor.detach()
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if self.is_main:
            return whole.cpu().contiguous()
        if self.device.type != "cpu":  # not tensors ahead: the main rank's copies would count as a collective's wait
            torch.accelerator.synchronize()
        return None

    def local_rows(self, tensor: Tensor) -> LocalRows:
        tensor = tensor.detach()
        if not isinstance(tensor, DTensor):
            return LocalRows(torch.atleast_1d(tensor), 0, self.rank, self.num_ranks)
        mesh = tensor.device_mesh
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)
        # one dimension of the mesh shards; if there is another, it replicates
        copy, num_copies = (mesh.get_local_rank(0), mesh.size(0)) if mesh.ndim == 2 else (0, 1)
        return LocalRows(tensor.to_local(), offsets[0], copy, num_copies)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        if self.num_ranks == 1:
            return values
        on_device = values.to(self.device)
        dist.all_reduce(on_device)
        return on_device.to(values.device)

    def barrier(self) -> None:
        self.rendezvous.barrier()

    def broadcast_from_main(self, text: Callable[[], str]) -> str:
        return self.rendezvous.broadcast_from_main(text)
