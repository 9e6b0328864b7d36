"""The score stage: the frozen opponent's log-probs of every response, computed once per iteration.

Training then holds one model, and no epoch pays for the opponent again.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from sparring import distributed
from sparring.commits import commit
from sparring.data.tables import SCORES, write_table
from sparring.iteration import Iteration
from sparring.logprobs import Scorer, score_groups
from sparring.model import load_model
from sparring.progress import track
from sparring.types import Group


def score(iteration: Iteration) -> None:
    """Writes score/opponent.parquet: the real answers, and the generated ones of every round in play."""
    start = time.monotonic()
    run, settings = iteration.run, iteration.recipe.train
    rounds = iteration.rounds()
    answers = {t: iteration.generations(t) for t in rounds}
    rows = iteration.train_rows()
    keys = [(t, sample) for t in rounds for sample in range(iteration.recipe.generate.samples)]
    groups = [
        Group(
            row.id,
            row.prompt_ids,
            {"real": (row.real_ids,), "generated": tuple(answers[t][row.id][s].token_ids for t, s in keys)},
        )
        for row in rows
    ]
    reads = run.reads(run.data, iteration.opponent, *(run.stage(t, "generate") for t in rounds))
    dtype = getattr(torch, iteration.recipe.weights_dtype)
    model = load_model(iteration.opponent, dtype=dtype, device=distributed.device())
    scorer = Scorer(model, getattr(torch, settings.dtype))
    with track(f"score {iteration.index}", len(groups)) as advance:
        scores = score_groups(scorer, groups, settings.micro_batch_tokens, advance)
    ids = [row.id for row in rows]
    columns = {
        "id": np.concatenate([ids, np.repeat(ids, len(keys))]),
        "role": ["real"] * len(ids) + ["generated"] * len(ids) * len(keys),
        "round": [0] * len(ids) + [t for t, _ in keys] * len(ids),
        "sample": [0] * len(ids) + [s for _, s in keys] * len(ids),
        "logprob": np.concatenate([scores["real"], scores["generated"].reshape(-1)]),
    }
    with commit(
        iteration.stage("score"),
        reads=reads,
        info={
            "seconds": time.monotonic() - start,
            "peak_memory_mib": distributed.peak_memory_mib(),
            "responses": len(columns["id"]),
        },
    ) as folder:
        write_table(folder / "opponent.parquet", SCORES, columns)
