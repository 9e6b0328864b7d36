"""Data parallelism: each rank holds the whole model, and gradients are averaged. Through accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sparring.parallel.rendezvous import Rendezvous


class Ddp:
    """`Parallel` for ranks that each hold the whole model."""

    name = "ddp"

    def __init__(self, rendezvous: Rendezvous, **accelerator_settings: Any) -> None:
        self.rendezvous = rendezvous
        self.accelerator = Accelerator(
            mixed_precision="no",  # autocast is the scorer's, so that scoring and training share one code path
            cpu=not torch.cuda.is_available(),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=rendezvous.timeout),
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

    def gather_full(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()

    def shard_like(self, full: Tensor, tensor: Tensor) -> Tensor:
        on_device = full.to(tensor.device)
        if not isinstance(tensor, DTensor):
            return on_device
        return distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        if self.num_ranks == 1:
            return values
        on_device = values.to(self.device)
        dist.all_reduce(on_device)
        return on_device.to(values.device)

    def any_rank(self, flag: bool) -> bool:
        return bool(self.all_reduce_sum(torch.tensor(float(flag))))

    def barrier(self) -> None:
        self.rendezvous.barrier()

    def broadcast_from_main(self, text: Callable[[], str]) -> str:
        return self.rendezvous.broadcast_from_main(text)
