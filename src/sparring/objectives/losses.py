"""Decreasing convex functions of a margin z: the `l` of SPIN (section 4.1) and of T-SPIN (eq. 7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor


def logistic(z: Tensor) -> Tensor:
    """log(1 + exp(-z)), stable for every z."""
    return F.softplus(-z)


def exponential(z: Tensor) -> Tensor:
    """exp(-z). Overflows float32 below z = -88: training then stops before the update."""
    return (-z).exp()


def hinge(z: Tensor) -> Tensor:
    """max(0, 1 - z)."""
    return F.relu(1 - z)


def correlation(z: Tensor) -> Tensor:
    """1 - z. Unbounded below unless the opponent equals the data distribution."""
    return 1 - z


LOSSES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "logistic": logistic,
    "exponential": exponential,
    "hinge": hinge,
    "correlation": correlation,
}
