"""T-SPIN with a reference: the ablation of the T-SPIN paper (arXiv 2601.08198, eq. 9)."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Literal

from torch import Tensor

from sparring.objectives.losses import LOSSES
from sparring.types import Lengths, Loss, Needs, NonNegative, Positive, Role, Scores


@dataclass(frozen=True)
class TspinRef:
    """loss = l(reward(real) - reward(generated)) + beta * l(reward(generated) - reward(proto))

    reward = alpha * (log p_policy - log p_opponent), where T-SPIN has alpha * log p_policy. Without the historical term
    it is SPIN with `rounds: 1`. The paper's formula and scale are not legible in the public text.
    """

    name: Literal["tspin-ref"] = "tspin-ref"
    alpha: Positive = 1.0
    beta: NonNegative = 0.1
    loss: Literal["logistic", "exponential"] = "logistic"

    @property
    def needs(self) -> Needs:
        roles: tuple[Role, ...] = ("real", "generated", "proto") if self.beta > 0 else ("real", "generated")
        return Needs(roles, opponent=True, rounds=1, first_round={"beta": 0.0})

    @property
    def start_loss(self) -> float:
        return (1 + self.beta) * (log(2) if self.loss == "logistic" else 1.0)

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return self.alpha * (policy - opponent)

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        link = LOSSES[self.loss]
        c = {role: self.reward(policy[role], opponent[role], lengths[role]) for role in self.needs.roles}
        current = link(c["real"][:, None] - c["generated"]).mean(dim=-1)
        if self.beta == 0:
            return Loss(current, {"loss/current": current})
        history = link(c["generated"] - c["proto"][:, None]).mean(dim=-1)
        return Loss(current + self.beta * history, {"loss/current": current, "loss/history": history})
