"""The chi-square game: squared loss on absolute rewards (after SPIF, arXiv 2602.01357, and SPPO, 2405.00675)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparring.types import Lengths, Loss, Needs, Positive, Scores


@dataclass(frozen=True)
class ChiSquare:
    """loss = c/2 * ((reward(real) - 1/c)^2 + (reward(generated) + 1/c)^2)

    reward = lambda * (log p_policy - log p_opponent). Each answer has a target of its own, 1/c or -1/c, so
    rewards stay bounded. SPIF's abstract gives the idea, the formula is derived. At lambda 1 it is c times
    SPPO's loss with hard labels and eta = 2/c.
    """

    name: Literal["chi-square"] = "chi-square"
    lambda_: Positive = 0.1
    c: Positive = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real", "generated"), opponent=True, rounds=1)

    @property
    def start_loss(self) -> float:
        return 1 / self.c

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return self.lambda_ * (policy - opponent)

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        real, generated = (self.reward(policy[role], opponent[role], lengths[role]) for role in ("real", "generated"))
        at_real = self.c / 2 * (real - 1 / self.c).square()
        at_generated = self.c / 2 * (generated + 1 / self.c).square().mean(dim=-1)
        return Loss(at_real + at_generated, {"loss/real": at_real, "loss/generated": at_generated})
