"""FlexAttention over shared prompts, for GPUs with Triton: one call for a whole row that skips masked blocks.

It has no backward pass on CPUs: tests compare its forward pass there, and compile both passes for GPUs ahead of time.
It has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128
"""Queries and keys per block of the mask: FlexAttention's default."""

SMALL_BLOCK = 2**14
"""Bytes of a small block in bfloat16: the four of the backward pass fit into the 99 KiB of a consumer card."""


def kernel_options(width: int, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Torch's own sizes of blocks, and small ones for cards that lack the shared memory for those.

    Always of the kernel that has a backward pass: rows below 128 tokens would get one for decoding. What each needs:
    benchmarks/ahead_of_time.py.
    """
    # half as many bytes in float32, which fills registers too
    row_bytes = dtype.itemsize * (dtype.itemsize // 2) * 2 ** (width - 1).bit_length()
    side = min(64, max(16, SMALL_BLOCK // row_bytes))
    small: dict[str, Any] = {"BACKEND": "TRITON", "num_stages": 1, "num_warps": 4}
    sizes = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
    return {"BACKEND": "TRITON"}, small | dict.fromkeys(sizes, side)


def is_compiled(device: torch.device) -> bool:
    """Whether torch compiles FlexAttention for this device. Elsewhere it computes all scores of a row."""
    return device.type == "cuda"


@cache
def compiled(device: torch.device) -> Callable[..., Any]:
    """FlexAttention, compiled on a GPU for dynamic lengths: compiling for each length would cost more than it saves.

    `fullgraph` makes torch raise where it would otherwise compute all scores of a row.
    """
    return torch.compile(flex_attention, dynamic=True, fullgraph=True) if is_compiled(device) else flex_attention


def visible_keys(sizes: Sequence[Sequence[int]], window: int) -> Int[np.ndarray, "3 time"]:
    """Which keys each position q attends to: from `own` to q, and from `first` to before `last`, as [own, first, last].

    `sizes`: the tokens of each group's prompt and responses, in order. A window counts positions in the text, in which
    every response follows its prompt directly. Adjacent spans are merged into `own`; the second one is then empty.
    """
    lengths = np.array([size for group in sizes for size in group])
    starts = np.cumsum(lengths) - lengths
    is_prompt = np.array([part == 0 for group in sizes for part in range(len(group))])
    prompt = np.maximum.accumulate(np.where(is_prompt, starts, 0))
    prompt_size = np.array([group[0] for group in sizes for _ in group]) * ~is_prompt  # 0: nothing beside `own`
    start, first, before = (np.repeat(values, lengths) for values in (starts, prompt, prompt_size))
    query = np.arange(lengths.sum())
    last = first + before
    own = np.maximum(start, query - window + 1)
    first = np.minimum(np.maximum(first, last + query - start - window + 1), last)
    is_adjacent = last == own
    own = np.where(is_adjacent, first, own)
    return np.stack([own, np.where(is_adjacent, last, first), last]).astype(np.int32)


def block_mask(sizes: Sequence[Sequence[int]], window: int, device: torch.device) -> BlockMask:
    """The mask of a row, from sizes alone.

    Equals `create_block_mask`, which materializes the row's whole mask: 43 GB at 64 thousand tokens.
    """
    own, first, last = (torch.from_numpy(keys).to(device) for keys in visible_keys(sizes, window))
    time = len(own)
    blocks = -(-time // BLOCK)
    query = torch.arange(time, device=device)
    # differences along a row of blocks: how many of its queries see some of, and all of, each block of keys
    some, every = torch.zeros(2, blocks, blocks + 1, dtype=torch.int32, device=device)

    def add(counts: Tensor, start: Tensor, end: Tensor) -> None:
        sign = (start < end).to(torch.int32)
        counts.index_put_((query // BLOCK, start), sign, accumulate=True)
        counts.index_put_((query // BLOCK, end), -sign, accumulate=True)

    for start, end in ((own.long(), query + 1), (first.long(), last.long())):
        add(some, start // BLOCK, torch.where(start < end, (end + BLOCK - 1) // BLOCK, start // BLOCK))
        add(every, (start + BLOCK - 1) // BLOCK, end // BLOCK)
    is_full = every.cumsum(1)[:, :-1] == BLOCK
    is_partial = (some.cumsum(1)[:, :-1] > 0) & ~is_full

    return BlockMask.from_kv_blocks(
        *_ordered(is_partial),
        *_ordered(is_full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda _, __, q, k: (k <= q) & ((k >= own[q]) | ((k >= first[q]) & (k < last[q]))),
        seq_lengths=(time, time),
    )


def _ordered(is_there: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and their indices, those first."""
    counts = is_there.sum(1, dtype=torch.int32)
    indices = is_there.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]
