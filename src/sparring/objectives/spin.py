"""SPIN: self-play fine-tuning (arXiv 2401.01335, eq. 4.7)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

from torch import Tensor

from sparring.objectives.losses import LOSSES
from sparring.types import Lengths, Loss, Needs, Positive, Scores


@dataclass(frozen=True)
class Spin:
    """loss = l(reward(real) - reward(generated)),  reward = lambda * (log p_policy - log p_opponent)

    l is logistic in the paper's experiments; it also names hinge, exponential and correlation. The opponent is the
    previous iterate, never the SFT model. From iteration 1 on, published SPIN trains on the generated responses of
    iterations t-1 and t together, both scored by the opponent of iteration t (`rounds: 2`, the authors in
    uclaml/SPIN#11); `rounds: 1` uses those of iteration t only. Several generated responses per prompt, which the paper
    does not use, are averaged.
    """

    name: Literal["spin"] = "spin"
    lambda_: Positive = 0.1
    loss: Literal["logistic", "hinge", "exponential", "correlation"] = "logistic"
    rounds: Literal[1, 2] = 2

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real", "generated"), opponent=True, rounds=self.rounds)

    @property
    def start_loss(self) -> float:
        return log(2) if self.loss == "logistic" else 1.0

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return self.lambda_ * (policy - opponent)

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        real = self.reward(policy["real"], opponent["real"], lengths["real"])
        generated = self.reward(policy["generated"], opponent["generated"], lengths["generated"])
        return Loss(LOSSES[self.loss](real[:, None] - generated).mean(dim=-1))
