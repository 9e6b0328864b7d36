"""The only importer of accelerate and torch.distributed: devices, precision, and what crosses processes."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import xxhash
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from sparring.disk import writing
from sparring.errors import Refused, Stopped
from sparring.progress import say


@cache
def accelerator() -> Accelerator:
    """One for the process. Autocast is the scorer's, so that scoring and training share one code path."""
    return Accelerator(mixed_precision="no")


def device() -> torch.device:
    return accelerator().device


def has_bfloat16_products() -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    A CPU without AVX-512-BF16 or AMX computes bfloat16 in float32, after conversions: slower than float32.
    """
    kind = device().type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind != "cpu":
        return kind != "mps"
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def backward(loss: Tensor) -> None:
    accelerator().backward(loss)


def clip_gradient(model: nn.Module, max_norm: float) -> float:
    """Scales the gradient down to `max_norm`; returns the norm that it had."""
    norm = accelerator().clip_grad_norm_(model.parameters(), max_norm)
    assert norm is not None
    return float(norm)


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
    with writing(root / "tensorboard"):
        found.init_trackers(
            "sparring", init_kwargs={"wandb": {**hosted, "id": identity, "dir": str(root)}, "trackio": hosted}
        )
    try:
        yield
    finally:
        trackers = list(found.trackers)
        found.trackers.clear()
        with writing(root / "tensorboard"):
            for tracker in trackers:
                tracker.finish()


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
