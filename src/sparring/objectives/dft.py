"""DFT: dynamic fine-tuning, SFT with each token weighted by its own probability (arXiv 2508.05629, eq. 9)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sparring.types import Lengths, Loss, Needs, Scores


@dataclass(frozen=True)
class Dft:
    """loss = - sum over tokens of sg(p_policy(token)) log p_policy(token), averaged over the real response's tokens

    sg: no gradient. The weight removes the 1/p of SFT's gradient, so that unlikely tokens of the data are hardly
    learned: the policy sharpens around what it already gives probability, and held-out NLL rises by design. Judge it by
    accuracy or by samples. Needs no opponent and no generated responses.
    """

    name: Literal["dft"] = "dft"

    @property
    def needs(self) -> Needs:
        return Needs(roles=("real",), opponent=False, rounds=0, per_token=("real",))

    @property
    def start_loss(self) -> None:
        return None

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return policy - opponent

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        tokens = policy["real"]
        return Loss(-(tokens.detach().exp() * tokens).sum(dim=-1) / lengths["real"])  # 0, the padding, adds 0
