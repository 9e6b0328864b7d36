"""Two calls that many tests make: a step in one process, and the generations of an iteration by row."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from sparring.model.logprobs import Scorer
from sparring.parallel import SingleProcess
from sparring.run.examples import read_iteration
from sparring.run.iteration import Iteration
from sparring.stages.train.policy import Policy
from sparring.stages.train.step import forward_backward
from sparring.types import Generation, Objective, TrainingExample


def step_metrics(
    scorer: Scorer,
    objective: Objective,
    examples: Sequence[TrainingExample],
    micro_batch_tokens: int,
    sft_weight: float = 0.0,
) -> dict[str, float]:
    """The metrics of a step. Leaves its gradients in the model."""
    policy = Policy(scorer.model, scorer, scorer, torch.optim.SGD(scorer.parameters()))
    return forward_backward(policy, objective, examples, micro_batch_tokens, sft_weight, SingleProcess())


def generations(iteration: Iteration, index: int) -> dict[str, list[Generation]]:
    """What iteration `index` of the same run generated, by row id, in the order of samples."""
    return {id: list(answers) for id, answers in groupby(read_iteration(iteration, index), key=lambda one: one.id)}
