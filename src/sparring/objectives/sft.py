"""SFT: supervised fine-tuning, the control that every method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparring.types import Lengths, Loss, Needs, Scores


@dataclass(frozen=True)
class Sft:
    """loss = -log p_policy(real), averaged over its tokens unless `average_logprobs` is false

    Needs no opponent and no generated responses. Its metrics report the log-ratio to the opponent as reward, so that
    its iterations can be compared with those of the other methods.
    """

    name: Literal["sft"] = "sft"
    average_logprobs: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real",), opponent=False, rounds=0)

    @property
    def start_loss(self) -> None:
        return None

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return policy - opponent

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        nll = -policy["real"]
        return Loss(nll / lengths["real"] if self.average_logprobs else nll)
