"""One optimizer step's gradient, and the checks around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from sparring.errors import RunError
from sparring.model.packing import PackedBatch, group_tokens, pack, rank_batches
from sparring.objectives.metrics import concatenate, log_ratio, self_play_metrics
from sparring.parallel import Parallel
from sparring.run.examples import stack_padded
from sparring.run.iteration import Iteration
from sparring.run.manifest import read_manifest
from sparring.stages.train.policy import Policy
from sparring.types import Loss, Objective, Role, Scores, TrainingExample

# Mean |log-ratio| in nats per token that is allowed at the first step, where the policy still is the opponent. It is 0
# where training cuts the micro-batches that were scored. Otherwise products have other shapes, and it is about what the
# score stage measured on other shapes; these are for models too small to show any.
LOG_RATIO_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}
TIMES_NOISE = 4.0


def forward_backward(
    policy: Policy,
    objective: Objective,
    batch: Sequence[TrainingExample],
    micro_batch_tokens: int,
    sft_weight: float,
    parallel: Parallel,
) -> dict[str, float]:
    """Adds the gradient of the batch's mean loss to the parameters; returns the means of all metrics.

    The loss is divided by the examples of the whole step before each backward pass, so that micro-batches and ranks
    change nothing but rounding. The gradient, but not the reported loss, includes `sft_weight` times the real
    responses' NLL per token.
    """
    scorer = policy.scorer
    groups = [example.group for example in batch]
    parts: list[Mapping[str, Tensor]] = []
    num_tokens = 0
    mine = rank_batches(scorer.packing, groups, micro_batch_tokens, parallel.num_ranks)[parallel.rank]
    for number, indices in enumerate(mine):
        # a rank without work computes the smallest group with weight 0, since collectives need every rank
        smallest = [] if indices else [min(range(len(batch)), key=lambda i: group_tokens(scorer.packing, groups[i]))]
        chosen = [batch[i] for i in indices or smallest]
        packed = pack(scorer.packing, [example.group for example in chosen]).to(scorer.device)
        opponent = stack_opponent(chosen, scorer.device)
        with parallel.accumulate(policy.forward, is_last=number == len(mine) - 1):
            # times the ranks, whose gradients are averaged
            weight = (parallel.num_ranks if indices else 0) / len(batch)
            scores, loss = backward_micro_batch(policy, objective, packed, opponent, sft_weight, weight, parallel)
        lengths = packed.lengths()
        num_tokens += packed.computed_tokens if indices else 0
        metrics = {
            "loss": loss.per_example,
            **loss.metrics,
            **self_play_metrics(objective, scores, opponent, lengths),
            **({"log_ratio": log_ratio(scores, opponent, lengths)} if opponent and not objective.needs.teacher else {}),
        }
        parts.append({name: value[: len(indices)] for name, value in metrics.items()})
    sums = {name: value.double().sum() for name, value in concatenate(parts).items()}
    # one reduction for all of them
    values = torch.tensor([*(value.item() for value in sums.values()), num_tokens], dtype=torch.float64)
    *totals, tokens = parallel.all_reduce_sum(values).tolist()
    means = {name: value / len(batch) for name, value in zip(sums, totals, strict=True)}
    return {**means, "num_tokens": int(tokens)}


def backward_micro_batch(
    policy: Policy,
    objective: Objective,
    packed: PackedBatch,
    opponent: Scores,
    sft_weight: float,
    weight: float,
    parallel: Parallel,
) -> tuple[Scores, Loss]:
    """Adds the gradient of `weight` times the examples' losses; returns the log-probs and the losses, detached."""
    token_logprobs = policy.forward(packed)
    scores, lengths = packed.scores(token_logprobs), packed.lengths()
    by_token = packed.token_scores(token_logprobs, objective.needs.per_token)
    loss = objective({**scores, **by_token}, opponent, lengths)
    total = loss.per_example
    if sft_weight:
        total = total - sft_weight * scores["real"] / lengths["real"]
    parallel.backward(total.sum() * weight)
    metrics = {name: value.detach() for name, value in loss.metrics.items()}
    return {role: logprob.detach() for role, logprob in scores.items()}, Loss(loss.per_example.detach(), metrics)


def stack_opponent(examples: Sequence[TrainingExample], device: torch.device) -> Scores:
    return {
        role: torch.from_numpy(stack_padded([example.opponent[role] for example in examples])).to(device)
        for role in examples[0].opponent
    }


def scoring_noise(iteration: Iteration) -> float:
    """What the score stage measured: see `stages.score.reference_noise`."""
    needs = iteration.recipe.method.needs
    if not needs.opponent or needs.teacher:
        return 0.0
    noise = read_manifest(iteration.stage("score")).info["noise_per_token"]
    assert isinstance(noise, float)
    return noise


def check_policy_equals_opponent(
    objective: Objective, metrics: Mapping[str, float], dtype: str, noise: float = 0.0
) -> None:
    """Before the first update the policy is the opponent: every log-ratio is 0, up to rounding.

    Catches another template, adapter, dtype or stale weights before hours are spent on them. `noise`: rounding of the
    opponent's log-probs, in nats per token, as it was measured; it grows with the model, the dtype and the length of
    the responses. The loss is not compared: it multiplies rounding by the objective's coefficients (`check_start_loss`
    compares it without rounding). A teacher reads another prompt, so its log-probs cannot tell.
    """
    allowed = max(LOG_RATIO_TOLERANCE[dtype], TIMES_NOISE * noise)
    if not objective.needs.opponent or objective.needs.teacher or metrics["log_ratio"] <= allowed:
        return
    raise RunError(
        f"Before the first update the policy must equal its opponent, but their log-probs differ by "
        f"{metrics['log_ratio']:.2g} nats per token, and rounding explains at most {allowed:.2g}. What was scored and "
        "what is trained differ in weights, tokens, precision or hardware. Delete the iteration's score folder and run "
        "the same command again; if that does not help, please report this as a bug."
    )


def check_start_loss(objective: Objective, batch: Sequence[TrainingExample]) -> None:
    """The objective of the opponent against itself must have its published constant as loss, exactly."""
    if objective.start_loss is None:
        return
    loss = float(np.mean([float(_loss_against_itself(objective, example)) for example in batch]))
    if not math.isclose(loss, objective.start_loss, rel_tol=1e-5):
        raise RunError(
            f"The loss of {objective.name} at log-ratio 0 is {loss:.6f} instead of {objective.start_loss:.6f}. Please "
            "report this as a bug."
        )


def _loss_against_itself(objective: Objective, example: TrainingExample) -> Tensor:
    opponent = stack_opponent([example], torch.device("cpu"))
    lengths: dict[Role, Tensor] = {
        role: torch.tensor([[len(response) for response in responses]])
        for role, responses in example.group.responses.items()
    }
    lengths = {role: values if role == "generated" else values[:, 0] for role, values in lengths.items()}
    return objective(opponent, opponent, lengths).per_example


def stop_if_not_finite(
    iteration: Iteration, step: int, what: str, value: float, batch: Sequence[TrainingExample]
) -> None:
    if math.isfinite(value):
        return
    ids = ", ".join(example.group.id for example in batch[:8])
    raise RunError(
        f"Iteration {iteration.index}, step {step + 1}: the {what} is {value}. Nothing was updated, and the last "
        f"checkpoint is intact. Rows of this step: {ids}{', ...' if len(batch) > 8 else ''}. Try a lower "
        "train.learning_rate or train.dtype: float32, in another run directory."
    )
