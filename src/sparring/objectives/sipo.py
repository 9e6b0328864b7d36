"""S-IPO: the squared loss of IPO in self-play, a baseline of the SPACE paper (arXiv 2512.07175; IPO is 2310.12036)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparring.types import Lengths, Loss, Needs, Positive, Scores


@dataclass(frozen=True)
class Sipo:
    """loss = (reward(real) - reward(generated) - 1 / (2 tau))^2,  reward = log p_policy - log p_opponent

    The gap has a target, so the loss pulls back a pair that is further apart. The SPACE paper names the baseline
    without a formula; this is IPO's (its eq. 17) with the opponent as reference. According to TRL, IPO's authors divide
    log-probs by length in practice: `average_logprobs`.
    """

    name: Literal["s-ipo"] = "s-ipo"
    tau: Positive = 0.1
    average_logprobs: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real", "generated"), opponent=True, rounds=1)

    @property
    def start_loss(self) -> float:
        return 1 / (2 * self.tau) ** 2

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return (policy - opponent) / lengths if self.average_logprobs else policy - opponent

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        real = self.reward(policy["real"], opponent["real"], lengths["real"])
        generated = self.reward(policy["generated"], opponent["generated"], lengths["generated"])
        return Loss((real[:, None] - generated - 1 / (2 * self.tau)).square().mean(dim=-1))
