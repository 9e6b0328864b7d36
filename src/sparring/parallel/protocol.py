"""What a stage asks of the processes that run it. Stages get a `Parallel` as a value and never ask which one it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class LocalRows(NamedTuple):
    """What this rank holds of a tensor: rows of its first dimension. A number without dimensions counts as one row."""

    values: Tensor
    """The rows: shares memory with the tensor."""
    first: int
    """The number of the first of them in the whole tensor."""
    copy: int
    """Which of the ranks with the same rows this one is."""
    num_copies: int
    """How many ranks hold the same rows."""

    def to_write(self) -> tuple[Tensor, int]:
        """A part of the rows and the number of its first: ranks that hold the same rows have different parts."""
        start, end = (len(self.values) * number // self.num_copies for number in (self.copy, self.copy + 1))
        return self.values[start:end], self.first + start


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

    def limit_waits(self) -> None:
        """After the first step: from here on a rank that does not reach a collective within seconds is lost."""
        ...

    def gather_on_main(self, tensor: Tensor) -> Tensor | None:
        """Collective. The whole tensor in the main rank's CPU memory, assembled where ranks hold shards; else None."""
        ...

    def local_rows(self, tensor: Tensor) -> LocalRows:
        """What this rank holds of `tensor`."""
        ...

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Collective. The sum over the ranks, on every rank."""
        ...

    def barrier(self) -> None:
        """Collective. Waits without a deadline while the missing ranks still send heartbeats."""
        ...

    def broadcast_from_main(self, text: Callable[[], str]) -> str:
        """Collective. What `text` returns on the main rank, which alone calls it."""
        ...
