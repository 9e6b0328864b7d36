"""What happens between the head's products, row by row: from logits to log-probs, and from there to slopes.

Plain torch, on a CPU in strips that stay in its caches. `triton.py` has the same two functions for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

STRIP = 2**20
"""Elements that are made float32 at a time on a CPU: 4 MiB."""


def logprobs_of(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], scale: float, softcap: float | None
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """log p of each target, and the logarithm of each row's normalizer; float32 (float64 of float64)."""
    logprobs, normalizers = [], []
    for strip, chosen in _strips(logits, targets):
        final = _final(strip, scale, softcap)
        normalizer = final.logsumexp(dim=1)
        logprobs.append(final.gather(1, chosen[:, None]).squeeze(1) - normalizer)
        normalizers.append(normalizer)
    return torch.cat(logprobs), torch.cat(normalizers)


def slopes_(
    logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens"],
    normalizers: Float[Tensor, " tokens"],
    outer: Float[Tensor, " tokens"],
    scale: float,
    softcap: float | None,
) -> None:
    """Puts outer * d log p(target) / d logits in the place of the logits: (one-hot - softmax) times inner slopes."""
    for strip, chosen, normalizer, gradient in _strips(logits, targets, normalizers, outer):
        final = _final(strip, scale, softcap)
        slope = None if softcap is None else 1 - (final / softcap).square()
        slopes = final.sub_(normalizer[:, None]).exp_().mul_(-gradient[:, None])
        slopes.scatter_add_(1, chosen[:, None], gradient[:, None])
        if slope is not None:
            slopes.mul_(slope)
        if scale != 1:
            slopes.mul_(scale)
        if slopes is not strip:
            strip.copy_(slopes)


def _strips(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, STRIP // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(*(x.split(rows) for x in (logits, *others)), strict=True)


def _final(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """float32, and the same tensor where nothing has to change."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)
