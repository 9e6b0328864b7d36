"""log p(token | prefix) from hidden states, never holding [tokens, vocab] beyond a fixed number of elements."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 2**23
"""Elements of the float32 logits that exist at a time: 32 MiB, 256 tokens of a vocabulary of 32,000."""

KEPT = 2**25
"""Elements of the logits that the forward pass may leave to the backward pass: 128 MiB. The rest is computed again,
which costs a third more products of the head, and only where a step is large."""


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
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        return _LinearLogprob.apply(hidden, weight, bias, targets, scale, softcap)  # type: ignore[no-any-return]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        rows = max(1, BLOCK // weight.shape[0])
        needs_gradient = any(ctx.needs_input_grad)
        logprobs, normalizers, kept = [], [], []
        room = KEPT if needs_gradient else 0
        for states, tokens in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = _logits(states, weight, bias, scale, softcap)
            normalizer = logits.logsumexp(dim=1)
            logprobs.append(logits.gather(1, tokens[:, None]).squeeze(1) - normalizer)
            normalizers.append(normalizer)
            room -= logits.numel()
            kept.append(logits if room >= 0 else None)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalizers))
        ctx.rows, ctx.scale, ctx.softcap, ctx.kept = rows, scale, softcap, kept
        return torch.cat(logprobs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # summed over blocks in float32, whatever the dtype of the products
        for_weight = torch.zeros_like(weight, dtype=normalizers.dtype) if needs_weight else None
        for_bias = torch.zeros_like(bias, dtype=normalizers.dtype) if needs_bias else None
        for_hidden = []
        # the kept logits are overwritten below; a second backward pass computes them again
        kept, ctx.kept = ctx.kept, [None] * len(ctx.kept)
        blocks = (x.split(ctx.rows) for x in (hidden, targets, normalizers, gradient))
        for logits, states, tokens, normalizer, outer in zip(kept, *blocks, strict=True):
            if logits is None:
                logits = _logits(states, weight, bias, ctx.scale, ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square()
            # d log p(target) / d logits = one-hot - softmax
            d_logits = logits.sub_(normalizer[:, None]).exp_().mul_(-outer[:, None])
            d_logits.scatter_add_(1, tokens[:, None], outer[:, None])
            if slope is not None:
                d_logits.mul_(slope)
            if ctx.scale != 1:
                d_logits.mul_(ctx.scale)
            if for_bias is not None:
                for_bias += d_logits.sum(dim=0)
            d_logits = d_logits.to(weight.dtype)
            if needs_hidden:
                for_hidden.append(d_logits @ weight)
            if for_weight is None:
                continue
            if weight.dtype == for_weight.dtype:
                for_weight.addmm_(d_logits.T, states)
            else:
                for_weight += d_logits.T @ states
        return (
            torch.cat(for_hidden) if needs_hidden else None,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None else for_bias.to(weight.dtype),
            None,
            None,
            None,
        )


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    logits = F.linear(states, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)
