"""Held-out rows: likelihood of the real answers, fresh answers, and the game against the opponent.

The fresh answers of one evaluation are the opponent's answers of the next, so each iteration draws once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from sparring.data.tables import IDS, id_lists, read_generations, read_table, write_generations, write_table
from sparring.errors import Stopped
from sparring.logging import track
from sparring.model.load import load_model, load_tokenizer, texts_of
from sparring.model.logprobs import Scorer, score_groups
from sparring.model.memory import tokens_at_a_time
from sparring.objectives.metrics import game_metrics, quadrants
from sparring.parallel import distributed
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit, commit_part, write_json
from sparring.stages.evaluate.checkers import is_correct, make_extract
from sparring.stages.evaluate.text_metrics import text_metrics
from sparring.types import (
    Backend,
    Generation,
    Group,
    Lengths,
    Objective,
    OpenBackend,
    Prompt,
    Rendered,
    Role,
    Scores,
    TokenIds,
)

ANSWERS = pa.schema(
    {
        "id": pa.string(),
        "token_ids": IDS,
        "finish": pa.string(),
        "text": pa.string(),
        "logprob": pa.float32(),  # of this answer, under the policy that gave it
        "real_logprob": pa.float32(),
        "opponent_logprob": pa.float32(),  # of the opponent's answer, under the policy
        "proto_logprob": pa.float32(),  # of the starting model's answer, under the policy
        "greedy_text": pa.string(),
        "is_correct": pa.bool_(),
        "is_greedy_correct": pa.bool_(),
    }
)


def evaluate(iteration: Iteration, open_backend: OpenBackend) -> None:
    """Writes evaluate/: metrics.json, and answers.parquet with one fresh answer per held-out row."""
    start = time.monotonic()
    run, recipe = iteration.run, iteration.recipe
    is_start = iteration.index < 0
    earlier = [] if is_start else [iteration.before().stage("evaluate"), run.start / "evaluate"]
    reads = run.reads(run.data, iteration.policy, *dict.fromkeys(earlier)) if distributed.is_first() else {}
    distributed.meet()
    rows = iteration.held_out_rows()
    tokenizer = load_tokenizer(iteration.policy)

    is_checked = recipe.evaluate.checker is not None
    fresh, greedy = answers(iteration, open_backend, rows, is_checked=is_checked)
    texts = texts_of(tokenizer, fresh)
    columns: dict[str, Sequence[object] | np.ndarray] = {
        "id": [row.id for row in rows],
        "token_ids": [a.token_ids for a in fresh],
        "finish": [a.finish for a in fresh],
        "text": texts,
    }
    metrics = text_metrics(fresh, [row.real_ids for row in rows])
    nothing = [None] * len(rows)
    greedy_texts, correct, greedy_correct = nothing, nothing, nothing
    if recipe.evaluate.checker is not None:
        greedy_texts = texts_of(tokenizer, greedy)
        extract = make_extract(recipe.evaluate.checker)
        correct = [is_correct(extract, text, row.real) for text, row in zip(texts, rows, strict=True)]
        greedy_correct = [is_correct(extract, text, row.real) for text, row in zip(greedy_texts, rows, strict=True)]
        metrics |= accuracy("sampled", correct) | accuracy("greedy", greedy_correct)

    opponent, proto = (Answers.read(folder) for folder in earlier) if earlier else (None, None)
    groups = []
    for index, (row, own) in enumerate(zip(rows, fresh, strict=True)):
        responses: dict[Role, tuple[TokenIds, ...]] = {"real": (row.real_ids,), "generated": (own.token_ids,)}
        if opponent and proto:
            responses["generated"] += (opponent.token_ids[index],)
            responses["proto"] = (proto.token_ids[index],)
        groups.append(Group(row.id, row.prompt_ids, responses))
    dtype = getattr(torch, recipe.weights_dtype)
    model = load_model(iteration.policy, dtype=dtype, device=distributed.device(), in_4bit=recipe.in_4bit)
    scorer = Scorer(model, getattr(torch, recipe.train.dtype))
    with track(f"evaluate {'start' if is_start else iteration.index}", len(groups)) as advance:
        at_a_time = tokens_at_a_time(recipe.train.micro_batch_tokens, distributed.device())
        scores = score_groups(scorer, groups, at_a_time, advance)
    if not distributed.is_first():
        return
    own_logprob, real_logprob = scores["generated"][:, 0], scores["real"]
    metrics |= likelihood(rows, real_logprob)
    metrics["entropy"] = float(-own_logprob.sum() / sum(len(a.token_ids) for a in fresh))
    if opponent and proto:
        metrics |= game(recipe.method, rows, scores, opponent, proto)
    columns |= {
        "logprob": own_logprob,
        "real_logprob": real_logprob,
        "opponent_logprob": scores["generated"][:, 1] if opponent else nothing,
        "proto_logprob": scores["proto"] if proto else nothing,
        "greedy_text": greedy_texts,
        "is_correct": correct,
        "is_greedy_correct": greedy_correct,
    }
    info = {
        "seconds": time.monotonic() - start,
        "rows": len(rows),
        "peak_memory_mib": distributed.peak_memory_mib(),
    }
    with commit(iteration.stage("evaluate"), reads=reads, info=info) as folder:
        write_table(folder / "answers.parquet", ANSWERS, columns)
        write_json(folder / "metrics.json", metrics)


def answers(
    iteration: Iteration, open_backend: OpenBackend, rows: Sequence[Rendered], *, is_checked: bool
) -> tuple[list[Generation], list[Generation]]:
    """Fresh answers to all rows, and greedy ones if they are checked. Every n-th rank that has an engine draws some."""
    settings = iteration.recipe.generate
    ranks = max(1, distributed.num_ranks() // settings.tensor_parallel_size)  # each engine has so many devices
    if distributed.num_ranks() == 1:
        with open_backend(iteration.policy) as backend:
            fresh = answer(iteration, backend, rows, greedy=False)
            return fresh, answer(iteration, backend, rows, greedy=True) if is_checked else []
    # whole batches, so that an answer does not depend on the number of ranks
    batch = settings.batch_size or 64
    order = sorted(rows, key=lambda row: (-len(row.prompt_ids), row.id))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    work = iteration.run.work(iteration.stage("evaluate"))
    kinds = (False, True) if is_checked else (False,)
    mine = [row for one in batches[distributed.rank() :: ranks] for row in one] if distributed.rank() < ranks else []
    if mine:
        with open_backend(iteration.policy) as backend:
            for greedy in kinds:
                drawn = answer(iteration, backend, mine, greedy=greedy)
                path = work / f"greedy-{greedy}-{distributed.rank()}.parquet"
                commit_part(path, lambda p, d=drawn: write_generations(p, d, [""] * len(d)))
    distributed.meet()
    found: list[list[Generation]] = [[], []]
    for greedy in kinds:
        by_id = {g.id: g for g in read_generations(sorted(work.glob(f"greedy-{greedy}-*.parquet")))}
        found[greedy] = [by_id[row.id] for row in rows]
    return found[0], found[1]


def answer(iteration: Iteration, backend: Backend, rows: Sequence[Rendered], *, greedy: bool) -> list[Generation]:
    """One answer per row, in the order of `rows`."""
    limit = iteration.recipe.generate.max_new_tokens
    prompts = [
        Prompt(
            id=row.id,
            sample=0,
            token_ids=row.prompt_ids,
            max_new_tokens=min(limit, iteration.data.max_length - len(row.prompt_ids)),
            seed=iteration.seed("held-out", row.id),
        )
        for row in sorted(rows, key=lambda row: (-len(row.prompt_ids), row.id))
    ]
    found: dict[str, Generation] = {}
    with track(f"answer {'greedily' if greedy else 'held-out prompts'}", len(prompts)) as advance:
        for generation in backend.generate(prompts, greedy=greedy):
            if generation.finish == "failed":
                raise Stopped(f"the engine cannot answer held-out row {generation.id}; take that row out of the data")
            found[generation.id] = generation
            advance(1, len(generation.token_ids))
    return [found[row.id] for row in rows]


class Answers:
    """What an earlier evaluation drew, in the order of the held-out rows."""

    def __init__(self, table: pa.Table) -> None:
        self.token_ids = id_lists(table["token_ids"])
        self.logprob: np.ndarray = table["logprob"].to_numpy()
        self.real_logprob: np.ndarray = table["real_logprob"].to_numpy()
        self.proto_logprob: np.ndarray = table["proto_logprob"].to_numpy()

    @staticmethod
    def read(folder: Path) -> Answers:
        return Answers(read_table(folder / "answers.parquet"))


def likelihood(rows: Sequence[Rendered], real_logprob: np.ndarray) -> dict[str, float]:
    """NLL of the real answers in nats per token, with the standard error of this ratio over rows."""
    lengths = np.array([len(row.real_ids) for row in rows])
    nll = float(-real_logprob.sum() / lengths.sum())
    residual = -real_logprob - nll * lengths
    return {
        "held_out_nll": nll,
        "held_out_nll_stderr": float(np.sqrt((residual**2).sum()) / lengths.sum()),
        "real_logprob": float(real_logprob.mean()),
    }


def accuracy(name: str, correct: Sequence[bool | None]) -> dict[str, float]:
    """Share of right answers among the rows that can be checked, with its standard error."""
    checked = [c for c in correct if c is not None]
    share = sum(checked) / len(checked) if checked else float("nan")
    error = (share * (1 - share) / len(checked)) ** 0.5 if checked else float("nan")
    return {f"{name}_accuracy": share, f"{name}_accuracy_stderr": error}


def game(
    objective: Objective,
    rows: Sequence[Rendered],
    scores: dict[Role, np.ndarray],
    opponent: Answers,
    proto: Answers,
) -> dict[str, float]:
    """The policy against its opponent, on the opponent's answers to held-out prompts."""
    is_first = bool(np.isnan(opponent.proto_logprob).all())  # the opponent's own answers are the proto answers
    policy: Scores = {
        "real": torch.from_numpy(scores["real"]),
        "generated": torch.from_numpy(scores["generated"][:, 1:]),
        "proto": torch.from_numpy(scores["proto"]),
    }
    theirs: Scores = {
        "real": torch.from_numpy(opponent.real_logprob.copy()),
        "generated": torch.from_numpy(opponent.logprob.copy())[:, None],
        "proto": torch.from_numpy((opponent.logprob if is_first else opponent.proto_logprob).copy()),
    }
    lengths: Lengths = {
        "real": torch.tensor([len(row.real_ids) for row in rows]),
        "generated": torch.tensor([len(ids) for ids in opponent.token_ids])[:, None],
        "proto": torch.tensor([len(ids) for ids in proto.token_ids]),
    }
    per_row = game_metrics(objective, policy, theirs, lengths)
    gap = per_row["logps/real"] - per_row["logps/generated"]
    means = {name: values.double().mean().item() for name, values in per_row.items()}
    accuracies = per_row["rewards/accuracies"]
    return {
        **means,
        "rewards/accuracies_stderr": (accuracies.var(correction=0) / len(accuracies)).sqrt().item(),
        "advantages/current": gap.mean().item(),
        "advantages/history_logps": (per_row["logps/generated"] - per_row["logps/proto"]).mean().item(),
        **{f"quadrants/{name}": share for name, share in quadrants(per_row["rewards/margins"], gap).items()},
        # E over the samples of q of log q - log p: they are true samples at temperature 1 and top-p 1
        "kl_from_opponent": (theirs["generated"] - policy["generated"]).mean().item(),
        "kl_from_start": float((proto.logprob - scores["proto"]).mean()),
    }
