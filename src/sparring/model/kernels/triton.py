"""`rows.py` for GPUs: each function is one Triton kernel that reads a row of logits once or twice.

cuBLAS computes the products around them. Tested in Triton's interpreter on CPU; not run on a GPU yet.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false, reportInvalidTypeForm=false
# (Triton comes with torch's CUDA builds; its decorator returns objects that are indexed by a grid)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

TILE = 4096


@triton.jit
def _final(logits, scale, softcap, IS_CAPPED: tl.constexpr):
    logits = logits * scale
    if IS_CAPPED:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
    return logits


@triton.jit
def _logprobs(
    logits,
    targets,
    logprobs,
    normalizers,
    vocab,
    stride,
    scale,
    softcap,
    IS_CAPPED: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    TILE: tl.constexpr,
):
    dtype = tl.float64 if IS_DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * stride
    columns = tl.arange(0, TILE)
    # a running maximum and sum per lane of the tile, combined at the end
    highest = tl.full([TILE], float("-inf"), dtype)
    total = tl.zeros([TILE], dtype)
    for at in range(0, vocab, TILE):
        is_there = at + columns < vocab
        values = _final(tl.load(start + at + columns, mask=is_there, other=0.0).to(dtype), scale, softcap, IS_CAPPED)
        higher = tl.maximum(highest, tl.where(is_there, values, highest))
        grown = total * tl.exp(tl.where(highest == higher, 0.0, highest - higher))
        total = tl.where(is_there, grown + tl.exp(values - higher), total)
        highest = higher
    top = tl.max(highest, 0)
    normalizer = top + tl.log(tl.sum(tl.where(total > 0, total * tl.exp(highest - top), 0.0), 0))
    tl.store(normalizers + row, normalizer)
    for target in range(row * NUM_TARGETS, (row + 1) * NUM_TARGETS):
        chosen = tl.load(start + tl.load(targets + target)).to(dtype)
        tl.store(logprobs + target, _final(chosen, scale, softcap, IS_CAPPED) - normalizer)


@triton.jit
def _slopes(
    logits,
    targets,
    normalizers,
    outer,
    vocab,
    stride,
    scale,
    softcap,
    IS_CAPPED: tl.constexpr,
    IS_DOUBLE: tl.constexpr,
    NUM_TARGETS: tl.constexpr,
    TILE: tl.constexpr,
):
    dtype = tl.float64 if IS_DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    place = logits + row * stride + columns
    values = _final(tl.load(place, mask=columns < vocab, other=0.0).to(dtype), scale, softcap, IS_CAPPED)
    probabilities = tl.exp(values - tl.load(normalizers + row))
    slopes = tl.zeros([TILE], dtype)
    for target in range(row * NUM_TARGETS, (row + 1) * NUM_TARGETS):
        is_target = (columns == tl.load(targets + target)).to(dtype)
        slopes += tl.load(outer + target) * (is_target - probabilities)
    slopes *= scale
    if IS_CAPPED:
        slopes = slopes * (1 - (values / softcap) * (values / softcap))
    tl.store(place, slopes.to(logits.dtype.element_ty), mask=columns < vocab)


def logprobs_of(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens *several"], scale: float, softcap: float | None
) -> tuple[Float[Tensor, " tokens *several"], Float[Tensor, " tokens"]]:
    """As `rows.logprobs_of`."""
    tokens = len(logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs = torch.empty(targets.shape, dtype=dtype, device=logits.device)
    normalizers = torch.empty(tokens, dtype=dtype, device=logits.device)
    targets = targets.contiguous()
    _logprobs[(tokens,)](logits, targets, logprobs, normalizers, **settings(logits, targets, scale, softcap))
    return logprobs, normalizers


def slopes_(
    logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens *several"],
    normalizers: Float[Tensor, " tokens"],
    outer: Float[Tensor, " tokens *several"],
    scale: float,
    softcap: float | None,
) -> None:
    """As `rows.slopes_`."""
    tokens, vocab = logits.shape
    grid = (tokens, triton.cdiv(vocab, TILE))
    targets, outer = targets.contiguous(), outer.contiguous()
    _slopes[grid](logits, targets, normalizers, outer, **settings(logits, targets, scale, softcap))


def settings(logits: Tensor, targets: Tensor, scale: float, softcap: float | None) -> dict[str, Any]:
    return {
        "vocab": logits.shape[1],
        "stride": logits.stride(0),
        "scale": scale,
        "softcap": softcap or 0.0,
        "IS_CAPPED": softcap is not None,
        "IS_DOUBLE": logits.dtype == torch.float64,
        "NUM_TARGETS": targets.shape[1] if targets.ndim == 2 else 1,
        "TILE": TILE,
    }
