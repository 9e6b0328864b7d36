"""SDFT: self-distillation fine-tuning; the teacher is the model with the answer in its prompt (arXiv 2601.19897)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from sparring.types import Lengths, Loss, Needs, Scores, Teacher

TEACHER_PROMPT = """\
{prompt}

This is an example for a response to the question:
{response}

Now answer with a response of your own, including the thinking process."""
"""The wording of the paper's section 3, as its authors' code has it."""


@dataclass(frozen=True)
class Sdft:
    """loss = sum over the generated response's tokens of a KL divergence from the teacher, averaged over the tokens

    The teacher is the opponent, whose prompt is `teacher_prompt`, filled in with the real response. `kl`:

    - forward: KL(teacher || policy) over the teacher's `top_k` likeliest tokens, and one bucket for all others. All
      results of the paper used it, according to its authors (idanshen/Self-Distillation#5).
    - reverse: sg(log p_policy - log p_teacher) log p_policy of the sampled token, sg: no gradient. Its gradient is that
      of KL(policy || teacher) while the policy is the opponent that sampled.

    Several generated responses per prompt are averaged. The policy never sees the real response.
    """

    name: Literal["sdft"] = "sdft"
    kl: Literal["forward", "reverse"] = "forward"
    top_k: Annotated[int, Ge(1)] = 32
    teacher_prompt: str = TEACHER_PROMPT

    def __post_init__(self) -> None:
        if "{response}" not in self.teacher_prompt:
            raise ValueError("teacher_prompt has no {response}, so the teacher would know no more than the policy")

    @property
    def needs(self) -> Needs:
        teacher = Teacher(self.teacher_prompt, self.top_k if self.kl == "forward" else 0)
        return Needs(roles=("generated",), opponent=True, rounds=1, per_token=("generated",), teacher=teacher)

    @property
    def start_loss(self) -> None:
        return None

    def reward(self, policy: Tensor, opponent: Tensor, lengths: Tensor) -> Tensor:
        return policy - opponent

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        ours, theirs = policy["generated"], opponent["generated"]  # [batch, samples, tokens, 1 + top_k]
        log_ratio = (ours[..., 0] - theirs[..., 0]).detach()
        if self.kl == "forward":
            ours, theirs = with_rest(ours[..., 1:]), with_rest(theirs[..., 1:])
            divergence = (theirs.exp() * (theirs - ours)).sum(dim=-1)
        else:
            divergence = log_ratio * ours[..., 0]
        per_token = {"loss": divergence, "kl_from_teacher": log_ratio}  # 0, the padding, adds 0
        means = {name: (values.sum(dim=-1) / lengths["generated"]).mean(dim=-1) for name, values in per_token.items()}
        return Loss(means.pop("loss"), means)


def with_rest(logprobs: Float[Tensor, "*_ candidates"]) -> Float[Tensor, "*_ candidates+1"]:
    """Appends the log-prob of all tokens that are not candidates."""
    of_candidates = logprobs.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7)  # rounding may reach 0
    return torch.cat([logprobs, (-of_candidates.expm1()).log()], dim=-1)
