"""S-SimPO: SimPO in self-play, a baseline of the SPACE paper (arXiv 2512.07175; SimPO is 2405.14734, eq. 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparring.objectives.losses import logistic
from sparring.types import Lengths, Loss, Needs, NonNegative, Positive, Scores


@dataclass(frozen=True)
class Ssimpo:
    """loss = l(reward(real) - reward(generated) - gamma),  reward = beta / tokens * log p_policy

    l(z) = log(1 + exp(-z)). No reference model. SimPO averages over tokens, so its optimum is not a function of
    sequence probabilities alone. beta and gamma are in the range of the SimPO paper; those of SPACE's baseline are
    not public.
    """

    name: Literal["s-simpo"] = "s-simpo"
    beta: Positive = 2.0
    gamma: NonNegative = 1.0

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real", "generated"), opponent=False, rounds=1)

    @property
    def start_loss(self) -> None:
        return None

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return self.beta * policy / lengths

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        real, generated = (self.reward(policy[role], policy[role], lengths[role]) for role in ("real", "generated"))
        return Loss(logistic(real[:, None] - generated - self.gamma).mean(dim=-1))
