"""log p(token | prefix) from hidden states, without materializing all logits [tokens, vocab]."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparring.logging import info
from sparring.model.kernels import rows

BLOCK = 256
"""The fewest tokens per chunk beyond those whose logits are kept. In smaller chunks, adding up the head's gradient
would cost more than computing it."""

GPU_BLOCK = 2**29
"""Bytes of logits per chunk on a GPU, which 256 tokens cannot fill: with a vocabulary of 128 thousand in bfloat16, an
eighth of the products, and of the additions to a gradient of 1 to 2 GB."""

KEPT = 2**27
"""Bytes of logits that the forward pass keeps for the backward pass. The rest is recomputed, at a third more matrix
products of the head."""


def linear_logprob(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens *several"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    is_kept: bool = True,
) -> Float[Tensor, " tokens *several"]:
    """`reference.linear_logprob` in chunks of tokens. Matrix products use autocast's dtype if it is on, everything else
    float32 (float64 for float64). `is_kept`: whether logits may be kept for the backward pass."""
    device, dtype = hidden.device.type, _product_dtype(hidden)
    with torch.autocast(device, enabled=False):
        return _LinearLogprob.apply(hidden, weight, bias, targets, dtype, scale, softcap, is_kept)  # type: ignore[no-any-return]


@torch.no_grad()
def linear_topk(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    count: int,
) -> Int[Tensor, "tokens count"]:
    """The `count` most probable tokens after each state, the most probable first, in chunks of tokens.

    Reads no scale and no softcap: a positive factor and a tanh keep the order of the logits.
    """
    device, dtype = hidden.device.type, _product_dtype(hidden)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        blocks = hidden.split(block_tokens(device, dtype.itemsize * len(weight)))
        return torch.cat([F.linear(states, weight, bias).topk(count).indices for states in blocks])


def _product_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        scale: float,
        softcap: float | None,
        is_kept: bool,
    ) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        row_bytes = dtype.itemsize * len(weight)
        kept = KEPT // row_bytes if is_kept and any(ctx.needs_input_grad) else 0
        ctx.sizes = _blocks(len(hidden), kept, block_tokens(hidden.device.type, row_bytes))
        ctx.kept, ctx.scale, ctx.softcap = None, scale, softcap
        logprobs, normalizers = [], []
        work = rows_for(hidden.device)
        for number, (states, tokens) in enumerate(zip(hidden.split(ctx.sizes), targets.split(ctx.sizes), strict=True)):
            logits = F.linear(states, weight, bias)
            logprob, normalizer = work.logprobs_of(logits, tokens, scale, softcap)
            logprobs.append(logprob)
            normalizers.append(normalizer)
            if number == 0 and kept:
                ctx.kept = logits
            del logits  # before the next chunk's are computed
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalizers))
        return torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        work, for_hidden, for_weight = rows_for(hidden.device), [], None
        for_bias = torch.zeros_like(bias, dtype=normalizers.dtype) if needs_bias else None
        # the kept logits are overwritten below; a second backward pass would recompute them
        logits, ctx.kept = ctx.kept, None
        blocks = (x.split(ctx.sizes) for x in (hidden, targets, normalizers, gradient))
        for states, *values in zip(*blocks, strict=True):
            if logits is None:
                logits = F.linear(states, weight, bias)
            work.slopes_(logits, *values, ctx.scale, ctx.softcap)
            if for_bias is not None:
                for_bias += logits.sum(dim=0, dtype=for_bias.dtype)
            if needs_hidden:
                for_hidden.append(logits @ weight)
            if needs_weight and for_weight is None:
                for_weight = (logits.T @ states).to(normalizers.dtype)
            elif for_weight is not None:  # accumulated in float32, whatever the dtype of the products
                for_weight += logits.T @ states
            logits = None
        of_hidden, of_weight, of_bias = ctx.dtypes
        return (
            torch.cat(for_hidden).to(of_hidden) if needs_hidden else None,
            None if for_weight is None else for_weight.to(of_weight),
            None if for_bias is None else for_bias.to(of_bias),
            *(None,) * 5,
        )


@cache
def rows_for(device: torch.device) -> ModuleType:
    """The row kernels for a device: Triton's on a GPU where they compile, otherwise torch's."""
    if device.type != "cuda" or find_spec("triton") is None:
        return rows
    from sparring.model.kernels import triton

    try:
        triton.logprobs_of(torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device), 1.0, None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler raises: slim images lack the C compiler that Triton starts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        info(
            f"note: The head's Triton kernels do not compile here: {reason}. Torch's own are used, which are slower. "
            "Triton needs a C compiler and Python's headers (gcc, python3-dev)."
        )
        return rows
    return triton


def block_tokens(device: str, row_bytes: int) -> int:
    """Tokens per chunk whose logits have so many bytes each."""
    return max(BLOCK, GPU_BLOCK // row_bytes) if device == "cuda" else BLOCK


def _blocks(tokens: int, kept: int, block: int) -> list[int]:
    """Tokens of each chunk: the first one holds all kept logits, so that its products are large."""
    sizes = [min(tokens, kept)] if kept else []
    return sizes + [min(block, tokens - start) for start in range(sum(sizes), tokens, block)]
