"""The score stage: the frozen opponent's log-probs of every response, computed once per iteration.

Training then holds one model, and no epoch pays for the opponent again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from sparring.data.formats import example_of
from sparring.data.read import BadRow
from sparring.data.render import Renderer
from sparring.data.tables import CANDIDATES, SCORES, write_table
from sparring.data.teacher import teacher_prompt_ids
from sparring.errors import UserError
from sparring.logging import info, track
from sparring.model.load import context_length, load_model, load_tokenizer
from sparring.model.logprobs import Scorer, score_candidates, score_groups
from sparring.model.memory import activation_bytes, checkpoint_activations, peak_memory_mib, search_range
from sparring.parallel import Parallel
from sparring.parallel.fsdp2 import keep_residual_stream_in_float32
from sparring.recipe.schema import Train
from sparring.run.examples import JoinedRow, generated_inputs, training_rows
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit
from sparring.run.schedule import Schedule
from sparring.types import Group, Role, Teacher

# What rounding explains between an engine's log-probs and the scorer's: mean |difference| in nats per token. Bfloat16
# has steps of 1/8 between 16 and 32, where the largest logits are: rounded once more, each moves by up to 1/16.
ENGINE_TOLERANCE = {"float32": 1e-3, "bfloat16": 1 / 16}

Columns = dict[str, Sequence[object] | np.ndarray]
TrainingRow = tuple[int, JoinedRow]
"""The iteration that generated the responses, and the row."""

NUM_RESCORED = 16
"""Training examples whose responses are scored twice, to measure rounding."""


def score(iteration: Iteration, parallel: Parallel) -> None:
    """Writes score/opponent.parquet, the opponent's log-prob of every response that the objective reads, or
    score/teacher.parquet, its candidates and their log-probs as a teacher."""
    start = time.monotonic()
    run, recipe = iteration.run, iteration.recipe
    sources = (run.data, iteration.opponent, *generated_inputs(iteration))
    input_digests = run.input_digests(*sources) if parallel.is_main else {}  # verified before they are read
    parallel.barrier()
    rows = training_rows(iteration)
    groups = [one.group(recipe.method.needs.roles, [t]) for t, one in rows]
    teacher = recipe.method.needs.teacher
    if teacher is None:
        name, schema = "opponent.parquet", SCORES
        columns, measured = score_responses(iteration, rows, groups, parallel)
    else:
        name, schema = "teacher.parquet", CANDIDATES
        columns, measured = score_by_teacher(iteration, teacher, rows, groups, parallel), {}
    if not parallel.is_main:
        return
    summary = {
        "seconds": time.monotonic() - start,
        "peak_memory_mib": peak_memory_mib(parallel.device),
        "responses": len(columns["id"]),
        **measured,
    }
    with commit(iteration.stage("score"), input_digests=input_digests, info=summary) as folder:
        write_table(folder / name, schema, columns)


def score_responses(
    iteration: Iteration, rows: Sequence[TrainingRow], groups: Sequence[Group], parallel: Parallel
) -> tuple[Columns, dict[str, float]]:
    """(columns of opponent.parquet, rounding and the engine's difference).

    The micro-batches are those of the first epoch of training, so that its log-ratios carry no rounding of other
    shapes: one side of a systematic difference would count as reward.
    """
    recipe = iteration.recipe
    steps = Schedule(recipe.train, len(groups), iteration.seed).first_epoch()
    scorer = load_opponent(iteration, parallel)
    micro_batch_tokens = training_micro_batch_tokens(recipe.train, scorer)
    with track(f"score {iteration.index}", len(groups)) as advance:
        scores = score_groups(scorer, groups, micro_batch_tokens, parallel, advance, steps)
    noise = reference_noise(scorer, groups, scores, steps[0][:NUM_RESCORED], parallel)
    measured = {**noise, **compare_with_engine(iteration, rows, scores)} if parallel.is_main else {}
    return score_columns(rows, groups, scores), measured


def score_by_teacher(
    iteration: Iteration,
    teacher: Teacher,
    rows: Sequence[TrainingRow],
    groups: Sequence[Group],
    parallel: Parallel,
) -> Columns:
    """The columns of teacher.parquet."""
    shown = show_real_responses(iteration, teacher, rows, groups)
    scorer = load_opponent(iteration, parallel)
    count = min(teacher.candidates, scorer.head.out_features)
    micro_batch_tokens = training_micro_batch_tokens(iteration.recipe.train, scorer)
    with track(f"score {iteration.index}", len(groups)) as advance:
        candidates, logprobs = score_candidates(scorer, shown, count, micro_batch_tokens, parallel, advance)
    places = [
        (index, sample, len(response))
        for index, group in enumerate(groups)
        for sample, response in enumerate(group.responses["generated"])
    ]
    return {
        "id": [groups[index].id for index, _, _ in places],
        "iteration": [rows[index][0] for index, _, _ in places],
        "sample": [sample for _, sample, _ in places],
        "candidates": [candidates[index, sample, :tokens].ravel() for index, sample, tokens in places],
        "logprobs": [logprobs[index, sample, :tokens].ravel() for index, sample, tokens in places],
    }


def show_real_responses(
    iteration: Iteration, teacher: Teacher, rows: Sequence[TrainingRow], groups: Sequence[Group]
) -> list[Group]:
    """The groups with the teacher's prompts. Raises `UserError` if one does not fit into the model's context."""
    model, data = Path(iteration.data.model), iteration.recipe.data
    render = Renderer(
        load_tokenizer(model),
        template=iteration.recipe.template,
        end_token=data.end_token,
        max_length=iteration.data.max_length,
        max_response=None,
        declared_ends=iteration.data.end_ids,
    )
    context, shown = context_length(model), list[Group]()
    for (_, one), group in zip(rows, groups, strict=True):
        example = example_of(one.row, data.columns, data.split_on, data.turns)
        longest = max(len(response) for response in group.responses["generated"])
        try:
            ids = teacher_prompt_ids(render, teacher, example, one.row.real, longest, context)
        except BadRow as problem:
            raise UserError(
                f"data: row {one.row.row}: {problem}. Remove the row, or shorten method.teacher_prompt."
            ) from problem
        shown.append(replace(group, prompt_ids=ids))
    return shown


def load_opponent(iteration: Iteration, parallel: Parallel) -> Scorer:
    """The opponent as training loads it as a policy."""
    recipe = iteration.recipe
    dtype = getattr(torch, recipe.train.dtype)
    # as shards are gathered: norms' weights too, which autocast leaves
    is_gathered = recipe.launch != "inline" and recipe.is_sharded
    held = dtype if is_gathered else getattr(torch, recipe.weights_dtype)
    model = load_model(iteration.opponent, dtype=held, device=parallel.device, in_4bit=recipe.in_4bit)
    if recipe.train.gradient_checkpointing:
        checkpoint_activations(model)
    if is_gathered:
        for parameter in model.parameters():  # of an adapter, which is loaded in float32
            parameter.data = parameter.data.to(dtype)
        if recipe.adapter is None and dtype != torch.float32:
            keep_residual_stream_in_float32(model)
    return Scorer(model, dtype)


def training_micro_batch_tokens(settings: Train, scorer: Scorer) -> int:
    """Tokens per micro-batch of training; with `auto` where its search begins, which on a CPU is also its end."""
    if settings.micro_batch_tokens != "auto":
        return settings.micro_batch_tokens
    is_checkpointing = settings.gradient_checkpointing
    per_token = activation_bytes(scorer.model.config, scorer.dtype.itemsize, checkpointing=is_checkpointing)
    return search_range(scorer.device, per_token)[0]


def reference_noise(
    scorer: Scorer,
    groups: Sequence[Group],
    scores: Mapping[Role, np.ndarray],
    chosen: Sequence[int],
    parallel: Parallel,
) -> dict[str, float]:
    """Rounding of the cached log-probs: mean |difference| when the `chosen` groups' responses are scored again, alone.

    In nats per token and in nats per response. For every rank.
    """
    cached = [
        (groups[index].prompt_ids, response, np.atleast_1d(scores[role][index])[sample])
        for index in chosen
        for role, responses in groups[index].responses.items()
        for sample, response in enumerate(responses)
    ]
    alone = [Group(str(i), prompt, {"real": (response,)}) for i, (prompt, response, _) in enumerate(cached)]
    again = score_groups(scorer, alone, 1, parallel, steps=[[i] for i in range(len(alone))])["real"]
    differences = np.abs(again - np.array([logprob for _, _, logprob in cached], dtype=np.float32))
    lengths = np.array([len(response) for _, response, _ in cached])
    return {
        "noise_per_token": float(np.mean(differences / lengths)),
        "noise_per_response": float(np.mean(differences)),
        "noise_responses": len(cached),
    }


def score_columns(rows: Sequence[TrainingRow], groups: Sequence[Group], scores: Mapping[Role, np.ndarray]) -> Columns:
    """The columns of opponent.parquet: one table row per response."""
    places: list[tuple[int, int, str, Role, int]] = [
        (index, t, one.row.id, role, sample)
        for index, ((t, one), group) in enumerate(zip(rows, groups, strict=True))
        for role, responses in group.responses.items()
        for sample in range(len(responses))
    ]
    return {
        "id": [id for _, _, id, _, _ in places],
        "role": [role for _, _, _, role, _ in places],
        "iteration": [t for _, t, _, _, _ in places],
        "sample": [sample for _, _, _, _, sample in places],
        "logprob": [np.atleast_1d(scores[role][index])[sample] for index, _, _, role, sample in places],
    }


def compare_with_engine(
    iteration: Iteration, rows: Sequence[TrainingRow], scores: Mapping[Role, np.ndarray]
) -> dict[str, float]:
    """How far the engine's log-probs of this iteration's answers are from the scorer's; empty if it reports none.

    Defined for true samples only: at another temperature or top_p an engine reports other probabilities.
    """
    generate = iteration.recipe.generate
    fresh = [(one, index) for index, (t, one) in enumerate(rows) if t == iteration.index and t in one.generated]
    if not fresh or (generate.temperature, generate.top_p) != (1, 1):
        return {}
    own = scores["generated"][[index for _, index in fresh], : generate.samples]
    return engine_difference([one for one, _ in fresh], iteration.index, own, iteration.recipe.train.dtype)


def engine_difference(
    joined: Sequence[JoinedRow], index: int, scores: Float[np.ndarray, "rows samples"], dtype: str
) -> dict[str, float]:
    """Mean |engine - scorer| in nats per token, with a note where rounding in `dtype` does not explain it.

    A large difference means other weights, another adapter, or other tokens than were sampled.
    """
    differences = [
        abs(answer.logprob - float(scored)) / len(answer.token_ids)
        for one, row in zip(joined, scores, strict=True)
        for answer, scored in zip(one.generated[index], row, strict=True)
        if answer.logprob is not None and len(answer.token_ids)
    ]
    if not differences:
        return {}
    difference, allowed = float(np.mean(differences)), ENGINE_TOLERANCE[dtype]
    if not difference <= allowed:
        info(
            f"note: The engine's log-probs of {len(differences)} responses differ from the scorer's by "
            f"{difference:.2g} nats per token, and rounding in {dtype} explains {allowed:g}. The engine serves "
            "another model than the one that is scored: check its weights, adapter and precision."
        )
    return {"engine_difference": difference, "engine_allowed": allowed, "engine_answers": len(differences)}
