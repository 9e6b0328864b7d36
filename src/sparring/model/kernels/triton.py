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
    chosen = tl.load(start + tl.load(targets + row)).to(dtype)
    tl.store(normalizers + row, normalizer)
    tl.store(logprobs + row, _final(chosen, scale, softcap, IS_CAPPED) - normalizer)


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
    TILE: tl.constexpr,
):
    dtype = tl.float64 if IS_DOUBLE else tl.float32
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    place = logits + row * stride + columns
    values = _final(tl.load(place, mask=columns < vocab, other=0.0).to(dtype), scale, softcap, IS_CAPPED)
    is_target = (columns == tl.load(targets + row)).to(dtype)
    slopes = tl.load(outer + row) * (is_target - tl.exp(values - tl.load(normalizers + row))) * scale
    if IS_CAPPED:
        slopes = slopes * (1 - (values / softcap) * (values / softcap))
    tl.store(place, slopes.to(logits.dtype.element_ty), mask=columns < vocab)


def logprobs_of(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], scale: float, softcap: float | None
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """As `rows.logprobs_of`."""
    tokens = len(logits)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logprobs, normalizers = (torch.empty(tokens, dtype=dtype, device=logits.device) for _ in range(2))
    _logprobs[(tokens,)](logits, targets, logprobs, normalizers, **settings(logits, scale, softcap))
    return logprobs, normalizers


def slopes_(
    logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    normalizers: Float[Tensor, " tokens"],
    outer: Float[Tensor, " tokens"],
    scale: float,
    softcap: float | None,
) -> None:
    """As `rows.slopes_`."""
    tokens, vocab = logits.shape
    grid = (tokens, triton.cdiv(vocab, TILE))
    _slopes[grid](logits, targets, normalizers, outer.contiguous(), **settings(logits, scale, softcap))


def settings(logits: Tensor, scale: float, softcap: float | None) -> dict[str, Any]:
    return {
        "vocab": logits.shape[1],
        "stride": logits.stride(0),
        "scale": scale,
        "softcap": softcap or 0.0,
        "IS_CAPPED": softcap is not None,
        "IS_DOUBLE": logits.dtype == torch.float64,
        "TILE": TILE,
    }
