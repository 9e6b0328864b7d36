"""Metrics of self-play, from log-probs alone: rewards, margins, advantages, and how reward and likelihood agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sparring.types import Lengths, Objective, Role, Scores


def self_play_metrics(
    objective: Objective, policy: Scores, opponent: Scores, lengths: Lengths
) -> Mapping[str, Float[Tensor, " batch"]]:
    """Metrics per example, averaged over several generated responses. A tie counts neither as a win nor as a loss.

    `opponent` may be empty for an objective that reads none. Without generated responses (DPO) the rejected ones take
    their place. Without real or without other responses, as of SDFT and of SFT, there are log-probs only.
    """
    metrics: dict[str, Tensor] = {}
    for role, logprob in policy.items():
        metrics[f"logps/{role}"] = _per_example(logprob)
        metrics[f"mean_logps/{role}"] = _per_example(logprob / lengths[role])
    rival: Role | None = next((role for role in ("generated", "rejected") if role in policy), None)
    if rival is None or "real" not in policy:
        return metrics
    # an objective that reads no opponent rewards the policy's log-probs
    reward = {
        role: objective.reward(logprob, opponent.get(role, logprob), lengths[role]) for role, logprob in policy.items()
    }
    per_row = (len(policy["real"]), -1)
    margin = reward["real"][:, None] - reward[rival].reshape(per_row)
    metrics["rewards/real"] = reward["real"]
    metrics[f"rewards/{rival}"] = _per_example(reward[rival])
    metrics["rewards/margins"] = _per_example(margin)
    metrics["rewards/accuracies"] = _per_example((margin > 0).float())
    metrics["rewards/ties"] = _per_example((margin == 0).float())
    log_likelihood_gap = policy["real"][:, None] - policy[rival].reshape(per_row)
    metrics["alignment"] = _per_example((margin.sign() == log_likelihood_gap.sign()).float())
    if "proto" in policy:
        metrics["advantages/history"] = _per_example(reward["generated"] - reward["proto"][:, None])
    return metrics


def log_ratio(policy: Scores, opponent: Scores, lengths: Lengths) -> Float[Tensor, " batch"]:
    """|log p_policy - log p_opponent| in nats per token, averaged over the responses of each example."""
    per_role = [_per_example((policy[role] - opponent[role]).abs() / lengths[role]) for role in policy]
    return torch.stack(per_role).mean(dim=0)


def quadrants(margin: Tensor, log_likelihood_gap: Tensor) -> dict[str, float]:
    """Fractions of rows by the signs of (reward margin, log-likelihood gap): Fig. 3 of the T-SPIN paper."""
    shares = {
        f"{name_r}_reward_{name_l}_likelihood": ((margin.sign() == r) & (log_likelihood_gap.sign() == sign)).float()
        for name_r, r in (("higher", 1), ("lower", -1))
        for name_l, sign in (("higher", 1), ("lower", -1))
    }
    ties = ((margin == 0) | (log_likelihood_gap == 0)).float()
    return {**{name: share.mean().item() for name, share in shares.items()}, "ties": ties.mean().item()}


def _per_example(values: Tensor) -> Tensor:
    return values.mean(dim=1) if values.ndim == 2 else values


def concatenate(parts: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenates per-example metrics of several micro-batches."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
