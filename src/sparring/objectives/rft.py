"""RFT: rejection fine-tuning on the opponent's own accepted responses (arXiv 2308.01825; STaR, 2203.14465)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparring.types import Lengths, Loss, Needs, Scores


@dataclass(frozen=True)
class Rft:
    """loss = -log p_policy(accepted response), averaged over its tokens

    The responses are the opponent's own with an end token that `evaluate.checker` accepts, equal ones of a
    prompt once; rows without any are left out. They take the place of the real responses, which the policy never sees.
    The control for everything that a checker can teach.
    """

    name: Literal["rft"] = "rft"

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real",), opponent=False, rounds=1, accepted=True)

    @property
    def start_loss(self) -> None:
        return None

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return policy - opponent

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        return Loss(-policy["real"] / lengths["real"])
