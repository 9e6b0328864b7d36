"""A stage in one process: every collective is the identity."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.parallel.protocol import LocalRows

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def local_device() -> torch.device:
    """The accelerator of this machine that torch uses, or its CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def num_local_devices() -> int:
    """GPUs of this machine, or CPU cores on a machine without GPUs."""
    return torch.cuda.device_count() or num_usable_cpus()


def num_usable_cpus() -> int:
    """CPU cores that this process may use, by its affinity and the quota of its container."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CPU_QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cpus  # not in a container with cgroup v2
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


@dataclass(frozen=True)
class SingleProcess:
    """`Parallel` for one process."""

    rank: int = 0
    num_ranks: int = 1
    is_main: bool = True
    is_sharded: bool = False
    topology: str = "1"
    device: torch.device = field(default_factory=local_device)

    def prepare(self, module: nn.Module, blocks: Sequence[str], optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        return module, optimizer

    def unwrap(self, optimizer: Optimizer) -> Optimizer:
        return optimizer

    def accumulate(self, module: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def optimizer_step(self, module: nn.Module, optimizer: Optimizer, max_norm: float | None) -> float:
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), max_norm or math.inf))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def limit_waits(self) -> None:
        pass

    def gather_on_main(self, tensor: Tensor) -> Tensor | None:
        return tensor.detach().cpu().contiguous()

    def local_rows(self, tensor: Tensor) -> LocalRows:
        return LocalRows(torch.atleast_1d(tensor.detach()), 0, 0, 1)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values

    def barrier(self) -> None:
        pass

    def broadcast_from_main(self, text: Callable[[], str]) -> str:
        return text()
