"""log p(token | prefix) from hidden states, never holding [tokens, vocab] beyond a fixed number of elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256
"""Tokens at a time whose logits exist, beyond those that are kept. Fewer make the head's gradient, which is added up
once per block, dearer than its product: at a vocabulary of 150,000 blocks of 55 tokens took a fifth longer."""

KEPT = 2**27
"""Bytes of logits that the forward pass may leave to the backward pass. The rest is computed again, which costs a third
more products of the head, and only where a step is large."""

STRIP = 2**20
"""Elements that are made float32 at a time on a CPU, 4 MiB: what stays in its caches from one operation to the next."""


def linear_logprob(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " tokens"],
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, " tokens"]:
    """`reference.linear_logprob` in blocks of tokens. Products in autocast's dtype if it is on; all else float32
    (float64 for float64)."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LinearLogprob.apply(hidden, weight, bias, targets, dtype, scale, softcap)  # type: ignore[no-any-return]


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
    ) -> Tensor:
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        kept = KEPT // (dtype.itemsize * len(weight)) if any(ctx.needs_input_grad) else 0
        ctx.sizes = _blocks(len(hidden), kept)
        ctx.kept, ctx.scale, ctx.softcap = None, scale, softcap
        logprobs, normalizers = [], []
        for number, (states, tokens) in enumerate(zip(hidden.split(ctx.sizes), targets.split(ctx.sizes), strict=True)):
            logits = F.linear(states, weight, bias)
            for strip, chosen in _strips(logits, tokens):
                final = _final(strip, scale, softcap)
                normalizer = final.logsumexp(dim=1)
                logprobs.append(final.gather(1, chosen[:, None]).squeeze(1) - normalizer)
                normalizers.append(normalizer)
            if number == 0 and kept:
                ctx.kept = logits
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalizers))
        return torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        for_hidden, for_weight = [], None
        for_bias = torch.zeros_like(bias, dtype=normalizers.dtype) if needs_bias else None
        # the kept logits are overwritten below; a second backward pass computes them again
        logits, ctx.kept = ctx.kept, None
        blocks = (x.split(ctx.sizes) for x in (hidden, targets, normalizers, gradient))
        for states, *values in zip(*blocks, strict=True):
            if logits is None:
                logits = F.linear(states, weight, bias)
            for strip, tokens, normalizer, outer in _strips(logits, *values):
                final = _final(strip, ctx.scale, ctx.softcap)
                slope = None if ctx.softcap is None else 1 - (final / ctx.softcap).square()
                # d log p(target) / d logits = one-hot - softmax
                slopes = final.sub_(normalizer[:, None]).exp_().mul_(-outer[:, None])
                slopes.scatter_add_(1, tokens[:, None], outer[:, None])
                if slope is not None:
                    slopes.mul_(slope)
                if ctx.scale != 1:
                    slopes.mul_(ctx.scale)
                if for_bias is not None:
                    for_bias += slopes.sum(dim=0)
                if slopes is not strip:
                    strip.copy_(slopes)
            if needs_hidden:
                for_hidden.append(logits @ weight)
            if needs_weight and for_weight is None:
                for_weight = (logits.T @ states).to(normalizers.dtype)
            elif for_weight is not None:  # summed over blocks in float32, whatever the dtype of the products
                for_weight += logits.T @ states
            logits = None
        of_hidden, of_weight, of_bias = ctx.dtypes
        return (
            torch.cat(for_hidden).to(of_hidden) if needs_hidden else None,
            None if for_weight is None else for_weight.to(of_weight),
            None if for_bias is None else for_bias.to(of_bias),
            *(None,) * 4,
        )


def _blocks(tokens: int, kept: int) -> list[int]:
    """Tokens of each block: first those whose logits are kept, in one piece, so that their products are large."""
    sizes = [min(tokens, kept)] if kept else []
    return sizes + [min(BLOCK, tokens - start) for start in range(sum(sizes), tokens, BLOCK)]


def _strips(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, STRIP // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(*(x.split(rows) for x in (logits, *others)), strict=True)


def _final(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """float32, and the same tensor where nothing has to change."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)
