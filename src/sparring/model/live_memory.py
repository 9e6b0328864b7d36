"""Counts the bytes of live tensors, operation by operation. On fake tensors that is the memory of a step nobody runs.

torch's `MemTracker` finds the same peaks (tested). It also attributes them to modules, which takes ten times as long.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, UntypedStorage
from torch._guards import active_fake_mode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveMemory(TorchDispatchMode):
    """Within the block: `live` bytes of the storages that operations made, and their `peak` since `restart`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}  # by the storage's address, while it lives

    def __enter__(self) -> LiveMemory:
        # operations within another fake mode compute shapes only: DTensor does that for every new one
        self._fake_mode = active_fake_mode()
        self._resize: Callable[[UntypedStorage, int], Any] = UntypedStorage.resize_
        tracker = self

        def resize(storage: UntypedStorage, size: int) -> Any:
            """FSDP2 frees gathered weights so, which is no operation."""
            result = tracker._resize(storage, size)
            if storage._cdata in tracker._sizes:
                tracker._change(storage._cdata, storage.nbytes())
            return result

        cast(Any, UntypedStorage).resize_ = resize
        return super().__enter__()

    def __exit__(self, *arguments: Any) -> None:
        cast(Any, UntypedStorage).resize_ = self._resize
        super().__exit__(*arguments)

    def restart(self) -> int:
        """The peak so far; the next one is counted from here."""
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first turns it into operations on shards
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # in earnest it makes no copy, although its fake does
        result = func(*args, **kwargs or {})
        if active_fake_mode() is self._fake_mode:
            tree_map_only(Tensor, self._track, result)
        return result

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address] = 0
            weakref.finalize(storage, self._free, address)
        self._change(address, storage.nbytes())

    def _change(self, address: int, size: int) -> None:
        self.live += size - self._sizes[address]
        self._sizes[address] = size
        self.peak = max(self.peak, self.live)

    def _free(self, address: int) -> None:
        self.live -= self._sizes.pop(address)
