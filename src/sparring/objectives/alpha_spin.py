"""alpha-SPIN: SPIN against a geometric mixture of the first and the last model (arXiv 2404.04291)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

from torch import Tensor

from sparring.objectives.losses import logistic
from sparring.types import Lengths, Loss, Needs, Positive, Scores, Share


@dataclass(frozen=True)
class AlphaSpin:
    """loss = l(reward(real) - reward(generated)),  l(z) = log(1 + exp(-z))

    reward = lambda * (log p_policy - alpha * log p_start - (1 - alpha) * log p_opponent): the log-probs that
    `opponent` holds are those of the mixture, which the score stage makes (`needs.anchor`). Answers are
    drawn by the opponent alone. The reference's normaliser cancels in the difference.
    """

    name: Literal["alpha-spin"] = "alpha-spin"
    lambda_: Positive = 0.1
    alpha: Share = 0.5

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real", "generated"), opponent=True, rounds=1, anchor=self.alpha)

    @property
    def start_loss(self) -> float | None:
        """Known only where the mixture is the opponent; in iteration 0 it is, but the objective cannot tell."""
        return log(2) if self.alpha == 0 else None

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return self.lambda_ * (policy - opponent)

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        real, generated = (self.reward(policy[role], opponent[role], lengths[role]) for role in ("real", "generated"))
        return Loss(logistic(real[:, None] - generated).mean(dim=-1))
