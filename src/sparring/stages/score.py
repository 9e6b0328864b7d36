"""The score stage: the frozen opponent's log-probs of every response, computed once per iteration.

Training then holds one model, and no epoch pays for the opponent again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from sparring.data.tables import SCORES, write_table
from sparring.logging import say, track
from sparring.model.load import load_model
from sparring.model.logprobs import Scorer, score_groups
from sparring.model.memory import tokens_at_a_time
from sparring.parallel import distributed
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit
from sparring.types import Generation, Group

# What rounding explains between an engine's log-probs and the scorer's: mean |difference| in nats per token. Bfloat16
# has steps of 1/8 between 16 and 32, where the largest logits are: rounded once more, each moves by up to 1/16.
ENGINE_AGREES = {"float32": 1e-3, "bfloat16": 1 / 16}


def score(iteration: Iteration) -> None:
    """Writes score/opponent.parquet: the log-probs of every response that the objective reads, of every round in play.

    Where the objective has an anchor they are those of a geometric mixture: anchor * log p_start + (1 - anchor) *
    log p_opponent.
    """
    start = time.monotonic()
    run, settings = iteration.run, iteration.recipe.train
    needs, rounds = iteration.recipe.method.needs, iteration.rounds()
    is_anchored = needs.anchor > 0 and iteration.index > 0
    models = [iteration.opponent, *([Path(iteration.data.model)] if is_anchored else [])]
    drawn_in = [
        run.stage(t, "generate") for t in (*rounds, *((iteration.proto_round,) if "proto" in needs.roles else ()))
    ]
    # verified before they are read; a stage that ranks share is committed by the first
    reads = run.reads(run.data, *models, *drawn_in) if distributed.is_first() else {}
    distributed.meet()
    answers = {t: iteration.generations(t) for t in rounds}
    keys = [(t, sample) for t in rounds for sample in range(iteration.recipe.generate.samples)]
    proto = iteration.generations(iteration.proto_round) if "proto" in needs.roles else {}
    rows = iteration.played_rows([*answers.values(), *([proto] if proto else [])])
    groups = []
    for row in rows:
        drawn = [answers[t][row.id][s] for t, s in keys]
        groups.append(Group(row.id, row.prompt_ids, iteration.responses(row, drawn, proto.get(row.id, []))))
    dtype = getattr(torch, iteration.recipe.weights_dtype)
    at_a_time = tokens_at_a_time(settings.micro_batch_tokens, distributed.device())
    found = []
    for path in models:
        model = load_model(path, dtype=dtype, device=distributed.device(), in_4bit=iteration.recipe.in_4bit)
        scorer = Scorer(model, getattr(torch, settings.dtype))
        with track(f"score {iteration.index}", len(groups)) as advance:
            found.append(score_groups(scorer, groups, at_a_time, advance))
        del model, scorer  # before the next one is loaded
    if not distributed.is_first():
        return
    scores = found[0]
    compared: dict[str, float] = {}
    own = [keys.index((t, s)) for t, s in keys if t == iteration.index]
    if own and (iteration.recipe.generate.temperature, iteration.recipe.generate.top_p) == (1, 1):
        compared = compare_engine(
            [answers[iteration.index][row.id] for row in rows], scores["generated"][:, own], settings.dtype
        )
    if is_anchored:
        scores = {role: needs.anchor * found[1][role] + (1 - needs.anchor) * found[0][role] for role in scores}
    ids = [row.id for row in rows]
    places = {role: keys if role == "generated" else [(0, 0)] for role in scores}
    columns = {
        "id": np.concatenate([np.repeat(ids, len(places[role])) for role in scores]),
        "role": [role for role in scores for _ in range(len(ids) * len(places[role]))],
        "round": [t for role in scores for t, _ in places[role] * len(ids)],
        "sample": [s for role in scores for _, s in places[role] * len(ids)],
        "logprob": np.concatenate([values.reshape(-1) for values in scores.values()]),
    }
    with commit(
        iteration.stage("score"),
        reads=reads,
        info={
            "seconds": time.monotonic() - start,
            "peak_memory_mib": distributed.peak_memory_mib(),
            "responses": len(columns["id"]),
            **compared,
        },
    ) as folder:
        write_table(folder / "opponent.parquet", SCORES, columns)


def compare_engine(
    drawn: Sequence[Sequence[Generation]], scores: Float[np.ndarray, "rows samples"], dtype: str
) -> dict[str, float]:
    """How far the log-probs that the engine reported are from the scorer's, on average, in nats per token.

    An engine reports those of some answers or of none; then this is empty. Far off are other weights, another adapter,
    or other tokens than were drawn.
    """
    far = [
        abs(answer.logprob - float(scored)) / len(answer.token_ids)
        for answers, row in zip(drawn, scores, strict=True)
        for answer, scored in zip(answers, row, strict=True)
        if answer.logprob is not None and len(answer.token_ids)
    ]
    if not far:
        return {}
    difference, allowed = float(np.mean(far)), ENGINE_AGREES[dtype]
    if not difference <= allowed:
        say(
            f"note: the engine's log-probs of {len(far)} answers are {difference:.2g} nats per token away from the "
            f"scorer's, and rounding in {dtype} explains {allowed:g}: it has drawn from another model than is scored. "
            "Look at what it serves: weights, adapter, precision"
        )
    return {"engine_difference": difference, "engine_allowed": allowed, "engine_answers": len(far)}
