"""Row-wise work between the head's matrix products: logits to log-probs, and their gradient.

Plain torch; on a CPU in strips that stay in its caches. `triton.py` has the same two functions for GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

STRIP = 2**20
"""Elements per strip on a CPU: 4 MiB of float32."""


def logprobs_of(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens *several"], scale: float, softcap: float | None
) -> tuple[Float[Tensor, " tokens *several"], Float[Tensor, " tokens"]]:
    """log p of each target, and the log-normalizer of each row; float32 (float64 for float64)."""
    logprobs, normalizers = [], []
    for strip, chosen in _strips(logits, targets):
        final = _final(strip, scale, softcap)
        normalizer = final.logsumexp(dim=1)
        logprobs.append((final.gather(1, _columns(chosen)) - normalizer[:, None]).view_as(chosen))
        normalizers.append(normalizer)
    return torch.cat(logprobs), torch.cat(normalizers)


def slopes_(
    logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, " tokens *several"],
    normalizers: Float[Tensor, " tokens"],
    outer: Float[Tensor, " tokens *several"],
    scale: float,
    softcap: float | None,
) -> None:
    """Replaces the logits with outer * d log p(target) / d logits: (one-hot - softmax) times inner derivatives.

    Over several targets of a row it adds up.
    """
    for strip, chosen, normalizer, of_chosen in _strips(logits, targets, normalizers, outer):
        gradients = _columns(of_chosen)
        final = _final(strip, scale, softcap)
        slope = None if softcap is None else 1 - (final / softcap).square()
        slopes = final.sub_(normalizer[:, None]).exp_().mul_(-gradients.sum(dim=1, keepdim=True))
        slopes.scatter_add_(1, _columns(chosen), gradients)
        if slope is not None:
            slopes.mul_(slope)
        if scale != 1:
            slopes.mul_(scale)
        if slopes is not strip:
            strip.copy_(slopes)


def _strips(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, STRIP // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(*(x.split(rows) for x in (logits, *others)), strict=True)


def _columns(values: Tensor) -> Tensor:
    """One column per target."""
    return values.reshape(len(values), -1)


def _final(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Final logits in float32; the same tensor if nothing has to change."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1:
        logits = logits * scale
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)
