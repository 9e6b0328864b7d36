"""How many tokens a micro-batch of training has: given, found by trying, or halved when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from sparring.errors import OutOfMemory
from sparring.logging import info
from sparring.model.memory import (
    activation_bytes,
    explain_out_of_memory,
    find_micro_batch_tokens,
    run_within_memory,
    search_range,
)
from sparring.model.optimizers import optimizer_state_bytes, trained_sizes
from sparring.model.packing import group_tokens, micro_batches
from sparring.parallel import Parallel
from sparring.run.iteration import Iteration
from sparring.run.manifest import replace_file
from sparring.stages.train.policy import Policy
from sparring.stages.train.step import forward_backward
from sparring.types import TrainingExample


def note_file(iteration: Iteration) -> Path:
    """Where the number is kept for a later start, if it was found or halved."""
    return iteration.run.work(iteration.stage("train")) / "micro_batch_tokens"


def choose_micro_batch_tokens(
    iteration: Iteration, policy: Policy, examples: Sequence[TrainingExample], parallel: Parallel
) -> int:
    """What an earlier start kept, what the recipe says, or what fits into memory."""
    setting, note = iteration.recipe.train.micro_batch_tokens, note_file(iteration)
    if note.is_file():
        return int(note.read_text())
    if setting != "auto":
        return setting
    fitting = fit_micro_batch_tokens(iteration, policy, examples, parallel)
    policy.optimizer.zero_grad(set_to_none=True)
    if parallel.is_main:
        replace_file(note, str(fitting))
    return fitting


def fit_micro_batch_tokens(
    iteration: Iteration, policy: Policy, examples: Sequence[TrainingExample], parallel: Parallel
) -> int:
    """The most tokens per micro-batch that fit. Leaves meaningless gradients behind.

    Tries the fullest micro-batches of all rows, the longest rows first, with gradients in place and as much memory
    reserved as the optimizer's state will need.
    """
    settings, objective, scorer = iteration.recipe.train, iteration.recipe.method, policy.scorer
    groups, ranks = [example.group for example in examples], parallel.num_ranks
    tokens = [group_tokens(scorer.packing, group) for group in groups]
    largest = max(tokens)
    per_token = activation_bytes(
        scorer.model.config, scorer.dtype.itemsize, checkpointing=settings.gradient_checkpointing
    )
    start, ceiling = search_range(scorer.device, per_token)
    if start >= ceiling:
        return start

    def attempt(micro_batch_tokens: int) -> None:
        fullest = micro_batches(scorer.packing, groups, micro_batch_tokens)[:ranks]
        batch = [examples[i] for indices in fullest for i in indices]

        def compute(micro_batch_tokens: int) -> None:
            forward_backward(policy, objective, batch, micro_batch_tokens, settings.sft_weight, parallel)

        if ranks == 1:
            compute(micro_batch_tokens)
        else:
            run_within_memory(compute, micro_batch_tokens, largest, _restart_ranks(note_file(iteration)))

    shortest = examples[int(np.argmin(tokens))]
    state_bytes = optimizer_state_bytes(settings.optimizer, *trained_sizes(scorer.model))
    with explain_out_of_memory("making gradients and the optimizer's state"):
        forward_backward(policy, objective, [shortest] * ranks, start, settings.sft_weight, parallel)
        reserved = torch.empty(
            state_bytes // (ranks if parallel.is_sharded else 1), dtype=torch.uint8, device=scorer.device
        )
    most = largest * math.ceil(settings.batch_size / ranks)  # that one step can have
    fitting = find_micro_batch_tokens(attempt, start, min(ceiling, 2 * most), largest)
    del reserved
    info(f"  {fitting:,} tokens per micro-batch")
    return fitting


def run_step_within_memory(
    iteration: Iteration,
    policy: Policy,
    batch: Sequence[TrainingExample],
    attempt: Callable[[int], dict[str, float]],
    parallel: Parallel,
) -> dict[str, float]:
    """The metrics of a step. When memory runs out, the step starts over, so its mathematics stays the same."""
    note = note_file(iteration)

    def on_halved(micro_batch_tokens: int) -> None:
        replace_file(note, str(micro_batch_tokens))
        policy.optimizer.zero_grad(set_to_none=True)

    largest = max(group_tokens(policy.scorer.packing, example.group) for example in batch)
    halved = on_halved if parallel.num_ranks == 1 else _restart_ranks(note)
    metrics, policy.micro_batch_tokens = run_within_memory(attempt, policy.micro_batch_tokens, largest, halved)
    return metrics


def _restart_ranks(note: Path) -> Callable[[int], None]:
    """When one rank runs out of memory the others wait in a collective: all start over from the last checkpoint."""

    def restart(micro_batch_tokens: int) -> None:
        replace_file(note, str(micro_batch_tokens))
        raise OutOfMemory(f"retrying with {micro_batch_tokens:,} tokens per micro-batch")

    return restart
