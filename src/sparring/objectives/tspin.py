"""T-SPIN: triplet self-play with an entropy constraint (arXiv 2601.08198, eq. 7 and appendix D)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparring.objectives.losses import LOSSES
from sparring.types import Lengths, Loss, Needs, NonNegative, Positive, Role, Scores


@dataclass(frozen=True)
class Tspin:
    """loss = l(reward(real) - reward(generated)) + beta * l(reward(generated) - reward(proto))

    reward = alpha * log p_policy: there is no reference model, so the reward is the likelihood that generates. The
    first term is the current advantage, the second the historical one. `proto` is the response of the model that the
    run started from, sampled once. In its first round generated and proto are the same responses, and the paper sets
    beta to 0. The paper does not say whether log-probs are summed or averaged over tokens; the sum is the likely
    reading, `average_logprobs` the other one.
    """

    name: Literal["tspin"] = "tspin"
    alpha: Positive = 1.0
    beta: NonNegative = 0.1
    loss: Literal["logistic", "exponential"] = "logistic"
    average_logprobs: bool = False

    @property
    def needs(self) -> Needs:
        roles: tuple[Role, ...] = ("real", "generated", "proto") if self.beta > 0 else ("real", "generated")
        return Needs(roles, opponent=False, rounds=1, first_round={"beta": 0.0})

    @property
    def start_loss(self) -> None:
        return None

    def confidence(self, policy: Tensor, lengths: Tensor) -> Tensor:
        """The paper's c = alpha * log p_policy (eq. 6)."""
        return self.alpha * (policy / lengths if self.average_logprobs else policy)

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return self.confidence(policy, lengths)

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        link = LOSSES[self.loss]
        c = {role: self.confidence(policy[role], lengths[role]) for role in self.needs.roles}
        current = link(c["real"][:, None] - c["generated"]).mean(dim=-1)
        if self.beta == 0:
            return Loss(current, {"loss/current": current})
        history = link(c["generated"] - c["proto"][:, None]).mean(dim=-1)
        return Loss(current + self.beta * history, {"loss/current": current, "loss/history": history})
