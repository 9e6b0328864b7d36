"""The train stage: one inner loop, from the opponent's weights to the next policy."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sparring.data.tables import read_scores
from sparring.errors import OutOfMemory, Stopped
from sparring.logging import say, track
from sparring.model.load import load_model, save_merged, save_successor
from sparring.model.logprobs import Scorer
from sparring.model.lora import train_adapter
from sparring.model.memory import activation_bytes, find_budget, where_to_look
from sparring.model.packing import arrange, group_tokens, micro_batches, rank_batches
from sparring.objectives.metrics import concatenate, game_metrics, log_ratio
from sparring.parallel import distributed, interrupt
from sparring.recipe.optimizer_specs import moment_bytes
from sparring.recipe.schema import Train
from sparring.run.disk import writing
from sparring.run.iteration import Iteration
from sparring.run.manifest import begin_work, commit, failpoint, replace_file
from sparring.run.seeds import permutation
from sparring.run.tracking import steps_before, track_step
from sparring.stages.train.checkpoint import load_checkpoint, save_checkpoint, trained_state
from sparring.stages.train.optimizers import make_optimizer, refuse_without_bitsandbytes, trained_sizes
from sparring.types import Group, Objective, Role, Scores

# What is tolerated at the first step, where the policy still is the opponent: mean |log-ratio| in nats per token, and
# the loss's distance from its constant. Zero where scoring and training cut the same batches; otherwise products of
# other shapes round otherwise: 2.5e-5 nats per token and 3e-3 in the loss were measured in bfloat16 on a small model.
SAME_MODEL = {"float32": 1e-5, "bfloat16": 5e-3}
START_LOSS = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Play:
    """One training example: a group, and the opponent's log-probs of its responses ({} if none are read)."""

    group: Group
    opponent: Mapping[Role, Float[np.ndarray, ...]]


def train(iteration: Iteration) -> None:
    """Writes train/: metrics.jsonl, one line per optimizer step, and model/, the next opponent."""
    start = time.monotonic()
    settings, objective = iteration.recipe.train, iteration.recipe.method
    is_first = distributed.is_first()
    reads = iteration.run.reads(iteration.run.data, *inputs(iteration)) if is_first else {}  # verified before use
    final = iteration.stage("train")
    work = iteration.run.work(final)
    if is_first:
        begin_work(work, reads)
    distributed.meet()
    plays = load_plays(iteration)

    dtype, adapter = getattr(torch, iteration.recipe.weights_dtype), iteration.recipe.adapter
    in_4bit = iteration.recipe.in_4bit
    # what is shared out goes to the device in parts
    device = torch.device("cpu") if distributed.is_sharded() else distributed.device()
    model = load_model(iteration.opponent, dtype=dtype, device=device, in_4bit=in_4bit)
    if adapter is not None:
        train_adapter(model, adapter.for_peft(), iteration.seed("adapter"))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # checkpointing works in training mode only; every dropout is 0
    scorer = Scorer(model, getattr(torch, settings.dtype))
    if scorer.why_padded:
        say(f"  every answer computes its prompt again, since {scorer.why_padded}")
    blocks: list[str] = sorted(model._no_split_modules or ())  # transformers' own list of what shards as one
    refuse_without_bitsandbytes(settings.optimizer, scorer.device)
    optimizer = make_optimizer(settings.optimizer, model, settings.learning_rate, settings.weight_decay)
    forward, optimizer = distributed.prepare(scorer, blocks, optimizer, max_norm := settings.gradient_clipping)

    steps_per_epoch = math.ceil(len(plays) / settings.batch_size)
    num_steps = settings.epochs * steps_per_epoch
    first_step = steps_before(iteration.run, iteration.index)
    metrics_file = work / "metrics.jsonl"
    budget_file = work / "micro_batch_tokens"  # what memory allowed, where that was not told or not so much
    done = load_checkpoint(work, model, optimizer, metrics_file, other_ranks=iteration.recipe.resume_with_other_ranks)
    distributed.meet()
    if budget_file.is_file():
        token_budget = int(budget_file.read_text())
    elif settings.micro_batch_tokens == "auto":
        token_budget = fitting_budget(scorer, objective, plays, settings, forward, budget_file)
        optimizer.zero_grad(set_to_none=True)
    else:
        token_budget = settings.micro_batch_tokens
    distributed.meet()
    log_to = metrics_file if is_first else Path(os.devnull)
    with track(f"train {iteration.index}", num_steps) as advance, log_to.open("a", encoding="utf-8") as log:
        advance(done, 0)
        for step in range(done, num_steps):
            began = time.monotonic()
            epoch, place = divmod(step, steps_per_epoch)
            order = permutation(len(plays), iteration.seed("order", epoch))
            batch = [plays[i] for i in order[place * settings.batch_size : (place + 1) * settings.batch_size]]

            while True:
                try:
                    metrics = forward_backward(scorer, objective, batch, token_budget, settings.sft_weight, forward)
                    break
                except RuntimeError as error:
                    largest = max(group_tokens(scorer.kind, play.group) for play in batch)
                    token_budget = distributed.smaller_budget(error, token_budget, largest)
                    replace_file(budget_file, str(token_budget))
                    if distributed.num_ranks() > 1:  # the others wait within the step: all begin anew
                        raise OutOfMemory from error
                    optimizer.zero_grad(set_to_none=True)  # the step begins anew, so its mathematics stays the same
            if step == 0:
                prove_same_model(objective, metrics, settings.dtype)
            computed = time.monotonic()
            stop_if_not_finite(iteration, step, "loss", metrics["loss"], batch)
            rate = learning_rate(step, num_steps, settings)
            for parameters in optimizer.param_groups:
                parameters["lr"] = rate
            gradient_norm = distributed.update(forward, optimizer, max_norm)
            stop_if_not_finite(iteration, step, "gradient's norm", gradient_norm, batch)

            line = {
                "step": step + 1,
                "epoch": (step + 1) / steps_per_epoch,
                **metrics,
                "learning_rate": rate,
                "gradient_norm": gradient_norm,
                "update_seconds": time.monotonic() - computed,
                "seconds": time.monotonic() - began,
            }
            with writing(metrics_file):
                log.write(json.dumps(line) + "\n")
                log.flush()
            track_step(line, first_step + step + 1, iteration.index - 1 + (step + 1) / num_steps)
            advance(1, int(metrics["num_tokens"]))
            failpoint("train-step")
            failpoint(f"train-step-of-rank-{distributed.rank()}")
            is_asked = distributed.any_rank(interrupt.is_asked())
            is_due = (step + 1) % settings.checkpoint_every == 0 or is_asked
            if is_due and step + 1 < num_steps:
                save_checkpoint(work, step + 1, model, optimizer, metrics_file)
                failpoint("checkpoint")
                if is_asked:
                    interrupt.stop()

    info = {
        "seconds": time.monotonic() - start,
        "steps": num_steps,
        "plays": len(plays),
        "layout": scorer.kind,
        "micro_batch_tokens": token_budget,
        "peak_memory_mib": distributed.peak_memory_mib(),
    }
    state = trained_state(model)
    if is_first:
        with commit(final, reads=reads, info=info, needs=sum(p.nbytes for p in model.parameters())) as folder:
            save_policy(model, state, iteration, folder / "model")
            failpoint("model-written")
            shutil.copyfile(metrics_file, folder / "metrics.jsonl")
        shutil.rmtree(work)
    distributed.meet()


def save_policy(model: PreTrainedModel, state: Mapping[str, Tensor] | None, iteration: Iteration, folder: Path) -> None:
    """The next opponent: a whole model, or an adapter beside its base. `state`: what is trained, if not the model's."""
    adapter = iteration.recipe.adapter
    if adapter is None or adapter.merge is None:
        save_successor(model, iteration.opponent, folder, state)
        return
    save_successor(model, iteration.opponent, alone := folder.with_name("adapter"), state)
    save_merged(alone, folder)


def forward_backward(
    scorer: Scorer,
    objective: Objective,
    batch: Sequence[Play],
    token_budget: int,
    sft_weight: float = 0.0,
    forward: torch.nn.Module | None = None,
) -> dict[str, float]:
    """Adds the gradient of the batch's mean loss to the parameters; returns the means of all metrics.

    To the gradient, and not to the loss that is returned, `sft_weight` times the real answers' NLL per token is added.

    The loss is divided by the examples of the whole step before each backward pass, so that how the step
    is cut into micro-batches, and how ranks share it out, changes nothing but rounding. `forward` is the scorer as
    the ranks have it.
    """
    groups, ranks = [play.group for play in batch], distributed.num_ranks()
    parts: list[Mapping[str, Tensor]] = []
    num_tokens = 0
    mine = rank_batches(scorer.kind, groups, token_budget, ranks)[distributed.rank()]
    for number, indices in enumerate(mine):
        # a rank without work goes along with the smallest group, for nothing
        smallest = [] if indices else [min(range(len(batch)), key=lambda i: group_tokens(scorer.kind, groups[i]))]
        chosen = [batch[i] for i in indices or smallest]
        layout = arrange(scorer.kind, [play.group for play in chosen]).to(scorer.device)
        with distributed.accumulating(forward or scorer, is_last=number == len(mine) - 1):
            policy, lengths = layout.scores((forward or scorer)(layout)), layout.lengths()
            opponent = _stack(chosen, scorer.device)
            loss = objective(policy, opponent, lengths)
            total = loss.per_example
            if sft_weight:
                total = total - sft_weight * policy["real"] / lengths["real"]
            # times the ranks: their gradients are averaged
            distributed.backward(total.sum() * (ranks if indices else 0) / len(batch), forward or scorer)
        num_tokens += layout.computed_tokens if indices else 0
        detached: Scores = {role: logprob.detach() for role, logprob in policy.items()}
        metrics = {
            "loss": loss.per_example.detach(),
            **{name: value.detach() for name, value in loss.metrics.items()},
            **game_metrics(objective, detached, opponent, lengths),
            **({"log_ratio": log_ratio(detached, opponent, lengths)} if opponent else {}),
        }
        parts.append({name: value[: len(indices)] for name, value in metrics.items()})
    sums = {name: value.double().sum() for name, value in concatenate(parts).items()}
    # one exchange for all of them
    values = torch.tensor([*(value.item() for value in sums.values()), num_tokens], dtype=torch.float64)
    *sums_of_all, tokens = distributed.total(values).tolist()
    return {
        **{name: value / len(batch) for name, value in zip(sums, sums_of_all, strict=True)},
        "num_tokens": int(tokens),
    }


def fitting_budget(
    scorer: Scorer, objective: Objective, plays: Sequence[Play], settings: Train, forward: torch.nn.Module, note: Path
) -> int:
    """The tokens that memory holds at a time, noted in a file for a later start. Leaves gradients that mean nothing.

    Tried are the fullest micro-batches of all rows, the longest rows first, with gradients in place and as much memory
    taken as the optimizer's moments will need.
    """
    groups, ranks = [play.group for play in plays], distributed.num_ranks()
    tokens = [group_tokens(scorer.kind, group) for group in groups]
    most = max(tokens) * math.ceil(settings.batch_size / ranks)  # that a step can have
    kept = activation_bytes(scorer.model.config, scorer.dtype.itemsize, checkpointing=settings.gradient_checkpointing)
    start, ceiling = where_to_look(scorer.device, kept)

    def attempt(budget: int) -> None:
        fullest = micro_batches(scorer.kind, groups, budget)[:ranks]
        batch = [plays[i] for indices in fullest for i in indices]
        try:
            forward_backward(scorer, objective, batch, budget, settings.sft_weight, forward)
        except RuntimeError as error:
            if ranks > 1:  # the others wait within the step: all begin anew
                replace_file(note, str(distributed.smaller_budget(error, budget, max(tokens))))
                raise OutOfMemory from error
            raise

    if start < ceiling and not distributed.zero_stage():  # whose gradients of a trial could not be taken back
        shortest = plays[int(np.argmin(tokens))]
        forward_backward(scorer, objective, [shortest] * ranks, start, settings.sft_weight, forward)
        num_bytes = sum(moment_bytes(settings.optimizer, *trained_sizes(scorer.model))) // (
            ranks if distributed.is_sharded() else 1
        )
        moments = torch.empty(num_bytes, dtype=torch.uint8, device=scorer.device)
        start = find_budget(attempt, start, min(ceiling, 2 * most), max(tokens))
        del moments
        say(f"  {start:,} tokens at a time")
    if distributed.is_first():
        replace_file(note, str(start))
    return start


def load_plays(iteration: Iteration) -> list[Play]:
    """Every training row once per round in play, with the responses that the objective reads."""
    needs = iteration.recipe.method.needs
    roles = needs.roles
    answers = {t: iteration.generations(t) for t in iteration.rounds()} if "generated" in roles else {}
    proto = iteration.generations(iteration.proto_round) if "proto" in roles else {}
    scores = read_scores(iteration.stage("score") / "opponent.parquet") if needs.opponent else {}
    plays = []
    rows = iteration.played_rows([*answers.values(), *([proto] if proto else [])])
    for t in answers or (0,):
        for row in rows:
            responses = iteration.responses(row, answers[t][row.id] if answers else [], proto.get(row.id, []))
            opponent: dict[Role, np.ndarray] = {}
            for role in roles if needs.opponent else ():
                if role == "generated":
                    found = [scores[row.id, role, t, sample] for sample in range(len(responses[role]))]
                else:
                    found = scores[row.id, role, 0, 0]
                opponent[role] = np.array(found, dtype=np.float32)
            plays.append(Play(Group(row.id, row.prompt_ids, responses), opponent))
    return plays


def inputs(iteration: Iteration) -> list[Path]:
    """What the stage reads beside data/."""
    needs, run = iteration.recipe.method.needs, iteration.run
    rounds = set(iteration.rounds()) | ({iteration.proto_round} if "proto" in needs.roles else set())
    scored = [iteration.stage("score")] if needs.opponent else []
    return [iteration.opponent, *scored, *(run.stage(t, "generate") for t in sorted(rounds))]


def _stack(plays: Sequence[Play], device: torch.device) -> Scores:
    return {
        role: torch.from_numpy(np.stack([play.opponent[role] for play in plays])).to(device)
        for role in plays[0].opponent
    }


def learning_rate(step: int, num_steps: int, settings: Train) -> float:
    """The rate of optimizer step `step`, from 0. Rises over the warm-up, and no step has rate 0."""
    warmup = math.ceil(settings.warmup * num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    gone = (step - warmup) / max(1, num_steps - warmup)
    match settings.schedule:
        case "linear":
            return settings.learning_rate * (1 - gone)
        case "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * gone))
        case "constant":
            return settings.learning_rate


def prove_same_model(objective: Objective, metrics: Mapping[str, float], dtype: str) -> None:
    """Before the first update the policy is the opponent: every log-ratio is 0, and the loss is known.

    Catches another template, adapter, dtype or stale weights before hours are spent on them.
    """
    if objective.start_loss is None:
        return
    distance, loss = metrics["log_ratio"], metrics["loss"]
    if distance <= SAME_MODEL[dtype] and abs(loss - objective.start_loss) <= START_LOSS[dtype]:
        return
    raise Stopped(
        f"before the first update the policy should be its opponent, but it is not: their log-probs differ by "
        f"{distance:.2g} nats per token ({SAME_MODEL[dtype]:g} allowed in {dtype}), and the loss is {loss:.6f} "
        f"instead of {objective.start_loss:.6f}. What was scored and what is trained then differ in weights, tokens or "
        "precision. Delete the iteration's score folder and run the same command again; if that does not help, it "
        "is a bug of sparring: please report it"
    )


def stop_if_not_finite(iteration: Iteration, step: int, what: str, value: float, batch: Sequence[Play]) -> None:
    if math.isfinite(value):
        return
    raise Stopped(
        f"iteration {iteration.index}, step {step + 1}: the {what} is {value}. "
        f"Nothing was updated; the last checkpoint is intact. Rows of this step: "
        f"{', '.join(play.group.id for play in batch[:8])}{', ...' if len(batch) > 8 else ''}. "
        "A lower train.learning_rate or train.dtype float32 may help; start it in another run directory"
    )
