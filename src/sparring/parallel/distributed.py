"""The only importer of accelerate and torch.distributed: devices, precision, and what crosses processes
(torchrun.py, which starts them, and zero.py, which hands them to DeepSpeed, import torch.distributed too).

A process that torchrun started for a stage is a rank, and says so once, with `join`; any other is alone.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import xxhash
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    PartialState,
)
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import filter_trackers
from accelerate.utils import DistributedType
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sparring.errors import RankLost, Refused, Stopped
from sparring.logging import say
from sparring.parallel import zero
from sparring.run.disk import writing

PROJECT = "sparring"
"""The project, or experiment, of every tracker."""

MLFLOW_TAG = "sparring.run"

BEAT_SECONDS = 2.0

LOST = ("imed out", "timeout", "Connection closed", "Connection reset", "Broken pipe", "NCCL error", "gloo", "ocket")
"""What the backends' errors say when another rank has died or does not answer."""

_joined: dict[str, Any] = {}  # what `join` was told; empty in a process that is no rank


def num_devices() -> int:
    """GPUs of this machine, or CPU cores where there is none."""
    return torch.cuda.device_count() or os.cpu_count() or 1


def join(parallel: str, timeout: float) -> None:
    """Makes this process one of the ranks, which train as `parallel` says.

    `timeout`: seconds that a rank waits for one that is late before it gives up.
    """
    _joined.update(parallel=parallel, timeout=timeout, meetings=0)
    threading.Thread(target=_beat, daemon=True).start()
    _store().add("started", 1)
    while _store().add("started", 0) < int(os.environ["WORLD_SIZE"]):  # starting may take a while, and one longer
        time.sleep(0.05)
    accelerator()


@cache
def accelerator() -> Accelerator:
    """One for the process. Autocast is the scorer's, so that scoring and training share one code path."""
    if not _joined:
        return Accelerator(mixed_precision="no")
    is_cpu = not torch.cuda.is_available()
    settings: dict[str, Any] = {
        "mixed_precision": "no",
        "cpu": is_cpu,
        "kwargs_handlers": [
            InitProcessGroupKwargs(timeout=timedelta(seconds=_joined["timeout"])),
            # else torch sorts its buckets anew after the first step of each start, and sums of three ranks and more
            # would round otherwise in a run that is continued
            DistributedDataParallelKwargs(find_unused_parameters=True),
        ],
    }
    if _joined["parallel"] == "fsdp2":
        settings["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
        )
    found = Accelerator(**settings)
    if is_cpu and "fsdp_plugin" in settings:  # accelerate shards on devices only; torch does it on CPUs just as well
        PartialState().distributed_type = found.state.distributed_type = DistributedType.FSDP
        found.state.fsdp_plugin = settings["fsdp_plugin"]
    return found


def device() -> torch.device:
    return accelerator().device


def rank() -> int:
    return accelerator().process_index if _joined else 0


def num_ranks() -> int:
    return accelerator().num_processes if _joined else 1


def is_first() -> bool:
    """Whether this rank is the one that writes and speaks."""
    return rank() == 0


def way() -> str:
    """How the ranks train: what the rounding of a step depends on, beside the machine."""
    return f"{num_ranks()} x {_joined['parallel']}" if num_ranks() > 1 else "1"


def zero_stage() -> int:
    """2 or 3 where DeepSpeed shares out what the ranks train, else 0."""
    return {"zero2": 2, "zero3": 3}.get(_joined["parallel"], 0) if num_ranks() > 1 else 0


def is_sharded() -> bool:
    """Whether a rank holds a part of the weights only."""
    return num_ranks() > 1 and (accelerator().distributed_type == DistributedType.FSDP or zero_stage() == 3)


def prepare(
    scorer: nn.Module, blocks: Sequence[str], optimizer: Optimizer, max_norm: float | None = None
) -> tuple[nn.Module, Optimizer]:
    """The scorer and its optimizer, on every rank; `blocks` are the names of the classes of the model's layers.

    `max_norm`: as `update` will be told.
    """
    if not _joined:
        return scorer, optimizer
    found = accelerator()
    if zero_stage():
        return zero.prepare(zero_stage(), scorer, optimizer, max_norm, timedelta(seconds=_joined["timeout"]))
    plugin = found.state.fsdp_plugin if found.distributed_type == DistributedType.FSDP else None
    if plugin is not None and plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = list(blocks)
    found.free_memory()  # of what was prepared before
    return cast(tuple[nn.Module, Optimizer], found.prepare(scorer, optimizer))


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer that `prepare` was given."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def accumulating(scorer: nn.Module, *, is_last: bool) -> AbstractContextManager[object]:
    """Around the forward and backward pass of a micro-batch: whole gradients cross the ranks after the last one only.

    Sharded ones cross each time: keeping them whole would cost the memory that sharding saves.
    """
    if zero_stage():
        zero.begin_pass(scorer, is_last=is_last)
        return nullcontext()
    return nullcontext() if is_last or is_sharded() else accelerator().no_sync(scorer)


def backward(loss: Tensor, scorer: nn.Module) -> None:
    """The gradients of the ranks are averaged, not added. `scorer`: as `prepare` returned it."""
    if zero_stage():
        zero.backward(loss, scorer)
    else:
        accelerator().backward(loss)


def update(scorer: nn.Module, optimizer: Optimizer, max_norm: float | None) -> float:
    """The optimizer's step with the gradient scaled down to `max_norm`; returns the norm that it had, over all ranks.

    Where that is not finite, no step is taken.
    """
    if zero_stage():
        return zero.update(scorer)
    clipped = accelerator().clip_grad_norm_(scorer.parameters(), max_norm or math.inf)
    assert clipped is not None
    norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """A tensor in the memory of the CPU, put together where ranks hold parts of it: then all must ask for it."""
    if zero_stage():
        return zero.whole(tensor)
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def like(whole: Tensor, tensor: Tensor) -> Tensor:
    """`whole` on the device of `tensor`; this rank's part of it if `tensor` is one."""
    on_device = whole.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return on_device
    return distribute_tensor(on_device, tensor.device_mesh, tensor.placements, src_data_rank=None)


def total(values: Tensor) -> Tensor:
    """The sum over the ranks, on every one."""
    if num_ranks() == 1:
        return values
    there = values.to(device())
    dist.all_reduce(there)
    return there.to(values.device)


def any_rank(is_so: bool) -> bool:
    return bool(total(torch.tensor(float(is_so))))


def meet() -> None:
    """Waits until all ranks are here: as long as it takes, if those that are missing show signs of life.

    Before a collective that some ranks may reach long after others, as when one writes a checkpoint.
    """
    if num_ranks() == 1:
        return
    _joined["meetings"] += 1
    here = f"meeting-{_joined['meetings']}"
    _store().add(here, 1)
    _wait(lambda: _store().add(here, 0) == num_ranks())


def first_says(text: Callable[[], str]) -> str:
    """What `text` returns on the first rank, which alone calls it."""
    if num_ranks() == 1:
        return text()
    _joined["meetings"] += 1
    here = f"said-{_joined['meetings']}"
    if is_first():
        _store().set(here, text())
    _wait(lambda: _store().check([here]))
    return _store().get(here).decode()


def _wait(is_done: Callable[[], bool]) -> None:
    beats: dict[int, tuple[int, float]] = {}
    while not is_done():
        now = time.monotonic()
        for other in range(num_ranks()):
            count = _store().add(f"beat-{other}", 0)
            if other not in beats or beats[other][0] != count:
                beats[other] = (count, now)
            elif now - beats[other][1] > _joined["timeout"]:
                raise RankLost(f"rank {other} has shown no sign of life for {_joined['timeout']:g} seconds")
        time.sleep(0.05)


@cache
def _store() -> Any:
    """torchrun's own, which lives as long as any rank."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=_joined["timeout"])
    return PrefixStore("sparring", TCPStore(address, port, is_master=False, timeout=timeout))


def _beat() -> None:
    """Tells the others every two seconds that this process runs."""
    while True:
        _store().add(f"beat-{os.environ['RANK']}", 1)
        time.sleep(BEAT_SECONDS)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank has died, or has not come to what all must do together."""
    return isinstance(error, (RankLost, dist.DistError)) or (
        isinstance(error, RuntimeError) and num_ranks() > 1 and any(word in str(error) for word in LOST)
    )


@contextmanager
def tracking(names: Sequence[str], root: Path, settings: Mapping[str, object]) -> Iterator[None]:
    """Within the block, what is logged goes to these trackers, as the run that `root` names."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise Refused(f"track: {missing[0]} is not installed; pip install '{missing[0]}', or leave it out")
    found = accelerator()
    found.log_with = filter_trackers(list(names), root)
    found.project_configuration.logging_dir = str(root / "tensorboard")
    hosted = {"name": root.name, "config": dict(settings), "resume": "allow"}
    identity = xxhash.xxh3_64_hexdigest(str(root).encode())  # so that a continued run goes on in its own line
    earlier = mlflow_run(identity) if "mlflow" in names else None
    with writing(root / "tensorboard"):
        found.init_trackers(
            PROJECT,
            init_kwargs={
                "wandb": {**hosted, "id": identity, "dir": str(root)},
                "trackio": hosted,
                "mlflow": {"run_name": root.name, "run_id": earlier, "tags": {MLFLOW_TAG: identity}},
            },
        )
        for tracker in found.trackers:
            if tracker.name == "wandb":
                for part in ("train/*", "eval/*"):
                    tracker.tracker.define_metric(part, step_metric="iteration")
            elif tracker.name == "mlflow" and earlier is None:
                tracker.store_init_configuration(flat(settings))
    try:
        yield
    finally:
        trackers = list(found.trackers)
        found.trackers.clear()
        with writing(root / "tensorboard"):
            for tracker in trackers:
                tracker.finish()


def mlflow_run(identity: str) -> str | None:
    """The id of the MLflow run that an earlier start of this run directory began. MLflow makes up ids by itself."""
    mlflow = import_module("mlflow")
    found = mlflow.search_runs(
        experiment_names=[os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)],
        filter_string=f"tags.`{MLFLOW_TAG}` = '{identity}'",
        max_results=1,
        output_format="list",
    )
    return found[0].info.run_id if found else None


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Dotted keys, as recipes and overrides write them."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def log(values: Mapping[str, float], step: int) -> None:
    found = accelerator()
    if found.trackers:
        with writing(Path(found.project_configuration.logging_dir or ".")):
            found.log(dict(values), step=step)


def peak_memory_mib() -> float:
    """Peak memory so far: of the device where it counts its own, else of the process."""
    if device().type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def smaller_budget(error: RuntimeError, token_budget: int, largest: int) -> int:
    """Half of `token_budget`, if `error` says that memory ran out; any other error goes on its way.

    `largest` is the least that can be computed at a time, the tokens of the largest group.
    """
    if not should_reduce_batch_size(error):
        raise error
    if token_budget <= largest:
        raise Stopped(
            f"memory ran out on a single prompt and its answers ({largest:,} tokens). A smaller train.max_length or "
            "generate.max_new_tokens, or train.gradient_checkpointing: true may help; start it in another run directory"
        ) from error
    clear_device_cache(garbage_collection=True)
    smaller = max(largest, token_budget // 2)
    say(f"  memory ran out at {token_budget:,} tokens at a time; going on with {smaller:,}")
    return smaller
