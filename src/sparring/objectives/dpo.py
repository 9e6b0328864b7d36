"""DPO on the user's preference pairs (arXiv 2305.18290, eq. 7): not self-play, but often the phase after it."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

from torch import Tensor

from sparring.objectives.losses import logistic
from sparring.types import Lengths, Loss, Needs, Positive, Scores


@dataclass(frozen=True)
class Dpo:
    """loss = l(reward(real) - reward(rejected)),  reward = beta * (log p_policy - log p_opponent)

    l(z) = log(1 + exp(-z)). `real` is the row's chosen response, `rejected` its rejected one; the reference is the
    model that the iteration starts from. Nothing is generated.
    """

    name: Literal["dpo"] = "dpo"
    beta: Positive = 0.1

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real", "rejected"), opponent=True, rounds=0)

    @property
    def start_loss(self) -> float:
        return log(2)

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return self.beta * (policy - opponent)

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        real, rejected = (self.reward(policy[role], opponent[role], lengths[role]) for role in ("real", "rejected"))
        return Loss(logistic(real - rejected))
