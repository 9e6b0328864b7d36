"""SPACE: noise-contrastive estimation on absolute rewards (arXiv 2512.07175, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log, log1p
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from sparring.types import Lengths, Loss, Needs, Positive, Scores


@dataclass(frozen=True)
class Space:
    """loss = -log s_mu(reward(real)) - mu * log s_{1/mu}(-reward(generated)),  s_mu(z) = 1 / (1 + mu e^-z)

    reward = log p_policy - log p_opponent, without a scale factor. s_mu(reward) is the probability that a response is
    real when generated ones are mu times as frequent, so the exact optimum is the data distribution for every mu. Each
    of k generated responses per prompt has weight mu / k, so the expectation does not depend on k. How the paper
    samples for mu > 1 is not public.
    """

    name: Literal["space"] = "space"
    mu: Positive = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real", "generated"), opponent=True, rounds=1)

    @property
    def start_loss(self) -> float:
        """(1 + mu) log(1 + mu) - mu log(mu)"""
        return (1 + self.mu) * log1p(self.mu) - self.mu * log(self.mu)

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return policy - opponent

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        real = F.softplus(log(self.mu) - (policy["real"] - opponent["real"]))
        generated = F.softplus(policy["generated"] - opponent["generated"] - log(self.mu)).mean(dim=-1)
        return Loss(real + self.mu * generated, {"loss/real": real, "loss/generated": self.mu * generated})
