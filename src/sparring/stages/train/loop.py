"""The train stage: one inner loop, from the opponent's weights to the next policy."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sparring.logging import track
from sparring.model.load import save_merged, save_successor
from sparring.model.lora import BASE, base_of
from sparring.model.memory import explain_out_of_memory, peak_memory_mib
from sparring.parallel import Parallel, interrupt
from sparring.run.disk import writing
from sparring.run.examples import generated_inputs, load_training_examples
from sparring.run.iteration import Iteration
from sparring.run.manifest import begin_work, commit, failpoint, hash_path, write_json
from sparring.run.schedule import Schedule
from sparring.run.tracking import NO_TRACKER, Tracker, steps_before
from sparring.stages.train.checkpoint import Checkpointer, trained_state
from sparring.stages.train.micro_batches import choose_micro_batch_tokens, run_step_within_memory
from sparring.stages.train.policy import Policy, load_policy
from sparring.stages.train.step import (
    check_policy_equals_opponent,
    check_start_loss,
    forward_backward,
    scoring_noise,
    stop_if_not_finite,
)
from sparring.types import TrainingExample


def train(iteration: Iteration, parallel: Parallel, tracker: Tracker = NO_TRACKER) -> None:
    """Writes train/: metrics.jsonl, one line per optimizer step, and model/, the next opponent."""
    start, settings = time.monotonic(), iteration.recipe.train
    input_digests = begin(iteration, parallel)
    examples = load_training_examples(iteration)
    with explain_out_of_memory("loading the model"):
        policy = load_policy(iteration, parallel)
    schedule = Schedule(settings, len(examples), iteration.seed)
    work = iteration.run.work(iteration.stage("train"))
    metrics_file = work / "metrics.jsonl"
    with Checkpointer(work, policy.model, policy.optimizer, metrics_file, parallel) as checkpoints:
        done = checkpoints.load()
        parallel.barrier()
        policy.micro_batch_tokens = choose_micro_batch_tokens(iteration, policy, examples, parallel)
        parallel.barrier()
        take_steps(iteration, policy, schedule, examples, done, checkpoints, tracker, parallel)
    parallel.barrier()  # no rank writes to the work folder any more
    summary = {
        "seconds": time.monotonic() - start,
        "steps": schedule.num_steps,
        "examples": len(examples),
        "packing": policy.scorer.packing,
        "micro_batch_tokens": policy.micro_batch_tokens,
        "peak_memory_mib": peak_memory_mib(parallel.device),
    }
    finish(iteration, policy, input_digests, summary, parallel)


def take_steps(
    iteration: Iteration,
    policy: Policy,
    schedule: Schedule,
    examples: Sequence[TrainingExample],
    done: int,
    checkpoints: Checkpointer,
    tracker: Tracker,
    parallel: Parallel,
) -> None:
    """The steps after the first `done`, with a line of metrics for each, and checkpoints on the way."""
    earlier_steps = steps_before(iteration.run, iteration.index)
    log_to = checkpoints.metrics if parallel.is_main else Path(os.devnull)
    seconds, saved_at = 60 * iteration.recipe.train.checkpoint_minutes, time.monotonic()
    with track(f"train {iteration.index}", schedule.num_steps) as advance, log_to.open("a", encoding="utf-8") as log:
        advance(done, 0)
        for step in range(done, schedule.num_steps):
            line = take_step(iteration, policy, schedule, schedule.batch(examples, step), step, parallel)
            if step == done:
                parallel.limit_waits()
            with writing(checkpoints.metrics):
                log.write(json.dumps(line) + "\n")
                log.flush()
            tracker.step(iteration, line, earlier_steps)
            advance(1, int(line["num_tokens"]))
            failpoint("train-step")
            failpoint(f"train-step-of-rank-{parallel.rank}")
            checkpoints.check()
            # one reduction for both: on a GPU each waits for the device
            flags = torch.tensor([float(interrupt.is_asked()), float(time.monotonic() - saved_at >= seconds)])
            is_asked, is_due = (count > 0 for count in parallel.all_reduce_sum(flags).tolist())
            if (is_asked or is_due) and step + 1 < schedule.num_steps:
                checkpoints.save(step + 1)
                saved_at = time.monotonic()
                failpoint("checkpoint")
                if is_asked:
                    checkpoints.wait()
                    parallel.barrier()
                    interrupt.stop()


def begin(iteration: Iteration, parallel: Parallel) -> dict[str, str]:
    """Verifies what the stage reads, before it is read, and makes its work folder."""
    input_digests: dict[str, str] = {}
    if parallel.is_main:
        scored = [iteration.stage("score")] if iteration.recipe.method.needs.opponent else []
        sources = (iteration.run.data, iteration.opponent, *scored, *generated_inputs(iteration))
        input_digests = iteration.run.input_digests(*sources)
        begin_work(iteration.run.work(iteration.stage("train")), input_digests)
    parallel.barrier()
    return input_digests


def take_step(
    iteration: Iteration,
    policy: Policy,
    schedule: Schedule,
    batch: Sequence[TrainingExample],
    step: int,
    parallel: Parallel,
) -> dict[str, float]:
    """One optimizer step; returns its line of metrics.jsonl."""
    objective, settings, began = iteration.recipe.method, iteration.recipe.train, time.monotonic()

    def attempt(micro_batch_tokens: int) -> dict[str, float]:
        return forward_backward(policy, objective, batch, micro_batch_tokens, settings.sft_weight, parallel)

    metrics = run_step_within_memory(iteration, policy, batch, attempt, parallel)
    if step == 0:
        check_start_loss(objective, batch)
        check_policy_equals_opponent(objective, metrics, settings.dtype, scoring_noise(iteration))
    computed = time.monotonic()
    stop_if_not_finite(iteration, step, "loss", metrics["loss"], batch)
    rate = schedule.learning_rate(step)
    for parameters in policy.optimizer.param_groups:
        parameters["lr"] = rate
    with explain_out_of_memory("updating the weights"):
        grad_norm = parallel.optimizer_step(policy.forward, policy.optimizer, settings.max_grad_norm)
    stop_if_not_finite(iteration, step, "gradient norm", grad_norm, batch)
    return {
        "step": step + 1,
        "epoch": (step + 1) / schedule.steps_per_epoch,
        **metrics,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "update_seconds": time.monotonic() - computed,
        "seconds": time.monotonic() - began,
    }


def finish(
    iteration: Iteration,
    policy: Policy,
    input_digests: dict[str, str],
    summary: dict[str, object],
    parallel: Parallel,
) -> None:
    """Commits the trained policy: a whole model, or an adapter beside its base."""
    final = iteration.stage("train")
    work, adapter = iteration.run.work(final), iteration.recipe.adapter
    state = trained_state(policy.model, parallel)
    if parallel.is_main:
        required_bytes = sum(parameter.nbytes for parameter in policy.model.parameters())
        with commit(final, input_digests=input_digests, info=summary, required_bytes=required_bytes) as folder:
            is_merged = adapter is not None and adapter.merge is not None
            trained = folder / ("adapter" if is_merged else "model")
            save_successor(policy.model, iteration.opponent, trained, state)
            if adapter is not None:  # the adapter is worthless on another base: export compares this digest
                base = base_of(iteration.opponent)
                write_json(trained / BASE, {"folder": str(base), "xxh3": hash_path(base)})
            if is_merged:
                save_merged(trained, folder / "model")
            failpoint("model-written")
            shutil.copyfile(work / "metrics.jsonl", folder / "metrics.jsonl")
        shutil.rmtree(work)
    parallel.barrier()
