"""The score stage: the frozen opponent's log-probs of every response, computed once per iteration.

Training then holds one model, and no epoch pays for the opponent again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from sparring.data.tables import SCORES, write_table
from sparring.logging import info, track
from sparring.model.load import load_model
from sparring.model.logprobs import Scorer, score_groups
from sparring.model.memory import inference_micro_batch_tokens, peak_memory_mib
from sparring.parallel import Parallel
from sparring.run.examples import JoinedRow, generated_inputs, read_joined
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit
from sparring.types import Role

# What rounding explains between an engine's log-probs and the scorer's: mean |difference| in nats per token. Bfloat16
# has steps of 1/8 between 16 and 32, where the largest logits are: rounded once more, each moves by up to 1/16.
ENGINE_TOLERANCE = {"float32": 1e-3, "bfloat16": 1 / 16}


def score(iteration: Iteration, parallel: Parallel) -> None:
    """Writes score/opponent.parquet: the opponent's log-prob of every response that the objective reads."""
    start = time.monotonic()
    run, recipe = iteration.run, iteration.recipe
    sources = (run.data, iteration.opponent, *generated_inputs(iteration))
    input_digests = run.input_digests(*sources) if parallel.is_main else {}  # verified before they are read
    parallel.barrier()
    joined, iterations = read_joined(iteration), iteration.rounds()
    groups = [one.group(recipe.method.needs.roles, iterations) for one in joined]
    weights_dtype = getattr(torch, recipe.weights_dtype)
    model = load_model(iteration.opponent, dtype=weights_dtype, device=parallel.device, in_4bit=recipe.in_4bit)
    scorer = Scorer(model, getattr(torch, recipe.train.dtype))
    micro_batch_tokens = inference_micro_batch_tokens(recipe.train.micro_batch_tokens, parallel.device)
    with track(f"score {iteration.index}", len(groups)) as advance:
        scores = score_groups(scorer, groups, micro_batch_tokens, parallel, advance)
    if not parallel.is_main:
        return
    columns = score_columns(joined, iterations, scores)
    summary = {
        "seconds": time.monotonic() - start,
        "peak_memory_mib": peak_memory_mib(parallel.device),
        "responses": len(columns["id"]),
        **compare_with_engine(iteration, joined, scores),
    }
    with commit(iteration.stage("score"), input_digests=input_digests, info=summary) as folder:
        write_table(folder / "opponent.parquet", SCORES, columns)


def score_columns(
    joined: Sequence[JoinedRow], iterations: Sequence[int], scores: dict[Role, np.ndarray]
) -> dict[str, Sequence[object] | np.ndarray]:
    """One table row per response; a response that was not generated has iteration 0 and sample 0."""
    ids = [one.row.id for one in joined]
    samples = [(t, answer.sample) for t in iterations for answer in joined[0].generated[t]] if joined else []
    places = {role: samples if role == "generated" else [(0, 0)] for role in scores}
    return {
        "id": np.concatenate([np.repeat(ids, len(places[role])) for role in scores]),
        "role": [role for role in scores for _ in range(len(ids) * len(places[role]))],
        "iteration": [t for role in scores for t, _ in places[role] * len(ids)],
        "sample": [sample for role in scores for _, sample in places[role] * len(ids)],
        "logprob": np.concatenate([values.reshape(-1) for values in scores.values()]),
    }


def compare_with_engine(
    iteration: Iteration, joined: Sequence[JoinedRow], scores: dict[Role, np.ndarray]
) -> dict[str, float]:
    """How far the engine's log-probs of this iteration's answers are from the scorer's; empty if it reports none.

    Defined for true samples only: at another temperature or top_p an engine reports other probabilities.
    """
    generate = iteration.recipe.generate
    if not joined or iteration.index not in joined[0].generated or (generate.temperature, generate.top_p) != (1, 1):
        return {}
    iterations = [t for t in iteration.rounds() for _ in joined[0].generated[t]]
    own = [place for place, t in enumerate(iterations) if t == iteration.index]
    return engine_difference(joined, iteration.index, scores["generated"][:, own], iteration.recipe.train.dtype)


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
