"""How many tokens fit into a micro-batch, and what happens when memory runs out. It changes no mathematics."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedConfig, PreTrainedModel

from sparring.errors import RunError, UserError
from sparring.logging import info

T = TypeVar("T")

M_MMAP_THRESHOLD, MMAP_BYTES = -3, 2**20
"""glibc's number of the setting, and a value that it never changes once it is set. Smaller blocks are reused: with
128 KiB, its first value, the demo's model trained a quarter slower, in page faults."""

START = {"cpu": 4096, "cuda": 16_384}
"""Tokens per micro-batch without gradients, and where the search for training starts."""
CEILING = {"cpu": 4096, "cuda": 262_144}
"""Where that search ends."""
MINIMUM = 512
CPU_ACTIVATION_BYTES = 2**28
"""Activations, by the estimate below, beyond which a CPU gets no faster: larger micro-batches only take memory."""
VALUES_PER_LAYER = 17
"""Kept per layer, token and hidden unit for the backward pass (Korthikanti et al. 2022: 34 bytes in 16 bits)."""


def inference_micro_batch_tokens(setting: int | Literal["auto"], device: torch.device) -> int:
    """Tokens per micro-batch of passes without gradients."""
    return START.get(device.type, START["cpu"]) if setting == "auto" else setting


def activation_bytes(config: PreTrainedConfig, bytes_per_value: int, *, checkpointing: bool) -> int:
    """Estimated bytes that one token keeps for the backward pass."""
    text = config.get_text_config()
    return text.num_hidden_layers * text.hidden_size * bytes_per_value * (1 if checkpointing else VALUES_PER_LAYER)


def search_range(device: torch.device, bytes_per_token: int) -> tuple[int, int]:
    """(start, ceiling) of the search for `micro_batch_tokens: auto`.

    On a CPU nothing is tried: an allocation succeeds until the system kills the process, and larger micro-batches are
    slower there.
    """
    if device.type != "cpu":
        return START.get(device.type, START["cpu"]), CEILING.get(device.type, CEILING["cpu"])
    tokens = START["cpu"]
    while tokens > MINIMUM and tokens * bytes_per_token > CPU_ACTIVATION_BYTES:
        tokens //= 2
    return tokens, tokens


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Turns gradient checkpointing on, and leaves the rest of the model in evaluation mode.

    transformers checkpoints a layer only if its `training` is set. Set for the whole model it would also turn on router
    jitter, sampled routing and nested dropout, and the policy would differ from the opponent that was scored.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"train.gradient_checkpointing: transformers does not offer it for {type(model).__name__}.")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def find_micro_batch_tokens(attempt: Callable[[int], object], start: int, ceiling: int, largest: int) -> int:
    """The largest of start, 2 start, 4 start, ... up to `ceiling` that fits; start/2, start/4, ... if start does not.

    `attempt` computes a full micro-batch of that many tokens. `largest`: tokens of the largest group, the least that
    can be computed.
    """
    _, fitting = run_within_memory(attempt, start, largest)
    while fitting >= start and 2 * fitting <= ceiling:
        try:
            attempt(2 * fitting)
        except RuntimeError as error:
            halve_micro_batch_tokens(error, 2 * fitting, largest)  # raises anything but "out of memory" again
            break
        fitting *= 2
    return fitting


def run_within_memory(
    attempt: Callable[[int], T],
    micro_batch_tokens: int,
    largest: int,
    on_halved: Callable[[int], object] = lambda tokens: None,
) -> tuple[T, int]:
    """What `attempt(micro_batch_tokens)` returns, and the number with which it fitted into memory.

    When memory runs out, `attempt` is called again with half as many; `on_halved` is told first.
    """
    while True:
        try:
            return attempt(micro_batch_tokens), micro_batch_tokens
        except RuntimeError as error:
            micro_batch_tokens = halve_micro_batch_tokens(error, micro_batch_tokens, largest)
        on_halved(micro_batch_tokens)


def halve_micro_batch_tokens(error: RuntimeError, micro_batch_tokens: int, largest: int) -> int:
    """Half of `micro_batch_tokens` if `error` says that memory ran out; raises any other error again."""
    if not should_reduce_batch_size(error):
        raise error
    if micro_batch_tokens <= largest:
        raise RunError(
            f"Out of memory on a single prompt with its responses ({largest:,} tokens). Lower train.max_length or "
            "generate.max_new_tokens, or set train.gradient_checkpointing: true, and start in another run directory."
        ) from error
    release_memory()
    smaller = max(largest, micro_batch_tokens // 2)
    info(f"  Out of memory at {micro_batch_tokens:,} tokens per micro-batch; retrying with {smaller:,}.")
    return smaller


@contextmanager
def explain_out_of_memory(what: str) -> Iterator[None]:
    """For what smaller micro-batches would not help: says what did not fit, and what would."""
    try:
        yield
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        raise RunError(
            f"Out of memory while {what}, which smaller micro-batches would not change. Set parallel: fsdp2 on several "
            "devices, train an adapter, or set train.optimizer: adamw_8bit, in another run directory."
        ) from error


def release_memory() -> None:
    """Gives memory that no tensor holds back to the device, for other processes too."""
    clear_device_cache(garbage_collection=True)


def return_freed_memory() -> None:
    """Makes the C library give large freed blocks back to the system, in this process from now on.

    glibc raises the size above which it does so whenever a larger block is freed, up to 32 MiB. Activations then share
    its heap with what stays, and the heap keeps its largest size.
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory so far: of the device if it counts its own, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
