"""What a stage asks of the processes that run it. Stages get a `Parallel` as a value and never ask which one it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@runtime_checkable
class Parallel(Protocol):
    """One process, or one of several ranks. Methods marked *collective* must be called by every rank."""

    @property
    def rank(self) -> int: ...

    @property
    def num_ranks(self) -> int: ...

    @property
    def is_main(self) -> bool:
        """Whether this rank writes to the run directory and to the log."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only a part of the weights."""
        ...

    @property
    def topology(self) -> str:
        """What the rounding of a step depends on beside the machine, such as "2 x fsdp2"."""
        ...

    def prepare(self, module: nn.Module, blocks: Sequence[str], optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """The module and its optimizer, wrapped for training. `blocks`: class names of the layers to shard as units."""
        ...

    def unwrap(self, optimizer: Optimizer) -> Optimizer:
        """The optimizer that `prepare` was given."""
        ...

    def accumulate(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        """Around the passes of a micro-batch. Whole gradients are reduced after the last micro-batch only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Collective. Gradients are averaged over the ranks."""
        ...

    def optimizer_step(self, module: nn.Module, optimizer: Optimizer, max_norm: float | None) -> float:
        """Collective. Clips the gradient to `max_norm`, steps, and clears it; returns the norm before clipping.

        Takes no step where that norm is not finite.
        """
        ...

    def gather_full(self, tensor: Tensor) -> Tensor:
        """Collective. The whole tensor in CPU memory, assembled where ranks hold shards of it."""
        ...

    def shard_like(self, full: Tensor, tensor: Tensor) -> Tensor:
        """This rank's shard of `full`, placed as `tensor` is."""
        ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Collective. The sum over the ranks, on every rank."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Collective. Whether `flag` is true on any rank."""
        ...

    def barrier(self) -> None:
        """Collective. Waits without a deadline while the missing ranks still send heartbeats."""
        ...

    def broadcast_from_main(self, text: Callable[[], str]) -> str:
        """Collective. What `text` returns on the main rank, which alone calls it."""
        ...
