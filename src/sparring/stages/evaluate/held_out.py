"""Evaluation on held-out rows: likelihood of the real responses, fresh responses, and the comparison with the opponent.

The fresh responses of one evaluation are the opponent's responses in the next, so each iteration samples once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import torch

from sparring.data.checkers import check_responses, make_check
from sparring.data.tables import IDS, id_lists, read_generations, read_table, write_generations, write_table
from sparring.errors import RunError
from sparring.logging import track
from sparring.model.load import decode_answers, load_model, load_tokenizer
from sparring.model.logprobs import Scorer, score_groups
from sparring.model.memory import inference_micro_batch_tokens, peak_memory_mib
from sparring.objectives.metrics import quadrants, self_play_metrics
from sparring.parallel import Parallel
from sparring.run.estimate import DIFFERENCE, FRACTION, estimate
from sparring.run.examples import join
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit, commit_part, write_json
from sparring.stages.evaluate.text_metrics import real_form, text_metrics
from sparring.types import (
    Backend,
    Finish,
    Generation,
    Lengths,
    Objective,
    OpenBackend,
    Prompt,
    Rendered,
    Role,
    Scores,
)

ANSWERS = pa.schema(
    {
        "id": pa.string(),
        "token_ids": IDS,
        "finish": pa.string(),
        "text": pa.string(),
        "logprob": pa.float32(),  # of this response, under the policy that sampled it
        "real_logprob": pa.float32(),
        "opponent_logprob": pa.float32(),  # of the opponent's response, under the policy
        "proto_logprob": pa.float32(),  # of the starting model's response, under the policy
        "greedy_text": pa.string(),
        "correctness": pa.float32(),  # what evaluate.checker returns: 0 to 1
        "greedy_correctness": pa.float32(),
    }
)


def evaluate(iteration: Iteration, open_backend: OpenBackend, parallel: Parallel) -> None:
    """Writes evaluate/: metrics.json, and answers.parquet with one fresh response per held-out row."""
    start, run, recipe = time.monotonic(), iteration.run, iteration.recipe
    earlier = [] if iteration.index < 0 else [iteration.before().stage("evaluate"), run.start / "evaluate"]
    input_digests = run.input_digests(run.data, iteration.policy, *dict.fromkeys(earlier)) if parallel.is_main else {}
    parallel.barrier()
    rows = iteration.held_out_rows()
    fresh, greedy = answers(iteration, open_backend, rows, parallel, is_checked=recipe.evaluate.checker is not None)
    opponent, proto = (Answers.read(folder) for folder in earlier) if earlier else (None, None)
    scores = score_answers(iteration, rows, fresh, opponent, proto, parallel)
    if not parallel.is_main:
        return
    columns, metrics = check_answers(iteration, rows, fresh, greedy)
    own_logprob = scores["generated"][:, 0]
    metrics |= likelihood(rows, scores["real"])
    metrics["entropy"] = float(-own_logprob.sum() / sum(len(answer.token_ids) for answer in fresh))
    if opponent and proto:
        metrics |= against_opponent(recipe.method, rows, scores, opponent, proto)
    columns |= {
        "logprob": own_logprob,
        "real_logprob": scores["real"],
        "opponent_logprob": scores["generated"][:, 1] if opponent else [None] * len(rows),
        "proto_logprob": scores["proto"] if proto else [None] * len(rows),
    }
    summary = {
        "seconds": time.monotonic() - start,
        "rows": len(rows),
        "peak_memory_mib": peak_memory_mib(parallel.device),
    }
    with commit(iteration.stage("evaluate"), input_digests=input_digests, info=summary) as folder:
        write_table(folder / "answers.parquet", ANSWERS, columns)
        write_json(folder / "metrics.json", metrics)


def check_answers(
    iteration: Iteration, rows: Sequence[Rendered], fresh: Sequence[Generation], greedy: Sequence[Generation]
) -> tuple[dict[str, Sequence[object] | np.ndarray], dict[str, float]]:
    """(columns of answers.parquet, metrics) that depend on the responses alone: form and correctness."""
    tokenizer, checker = load_tokenizer(iteration.policy), iteration.recipe.evaluate.checker
    texts, nothing = decode_answers(tokenizer, fresh), [None] * len(rows)
    columns: dict[str, Sequence[object] | np.ndarray] = {
        "id": [row.id for row in rows],
        "token_ids": [answer.token_ids for answer in fresh],
        "finish": [answer.finish for answer in fresh],
        "text": texts,
        "greedy_text": nothing,
        "correctness": nothing,
        "greedy_correctness": nothing,
    }
    metrics = text_metrics(fresh, [row.real_ids for row in rows]) | real_form(rows)
    if checker is not None:
        check, greedy_texts = make_check(checker), decode_answers(tokenizer, greedy)
        sampled_results, greedy_results = (check_responses(check, some, rows) for some in (texts, greedy_texts))
        metrics |= accuracy("sampled", rows, sampled_results) | accuracy("greedy", rows, greedy_results)
        columns |= {"greedy_text": greedy_texts, "correctness": sampled_results, "greedy_correctness": greedy_results}
    return columns, metrics


def score_answers(
    iteration: Iteration,
    rows: Sequence[Rendered],
    fresh: Sequence[Generation],
    opponent: Answers | None,
    proto: Answers | None,
    parallel: Parallel,
) -> dict[Role, np.ndarray]:
    """The policy's log-probs of the real responses, its own, its opponent's, and the starting model's."""
    recipe, index, roles = iteration.recipe, iteration.index, ["real", "generated"]
    generated, protos = {index: fresh}, None
    if opponent and proto:
        generated[index - 1], protos = opponent.generations(rows), proto.generations(rows)
        roles.append("proto")
    groups = [one.group(cast(list[Role], roles), generated) for one in join(rows, generated, protos)]
    dtype = getattr(torch, recipe.weights_dtype)
    model = load_model(iteration.policy, dtype=dtype, device=parallel.device, in_4bit=recipe.in_4bit)
    scorer = Scorer(model, getattr(torch, recipe.train.dtype))
    micro_batch_tokens = inference_micro_batch_tokens(recipe.train.micro_batch_tokens, parallel.device)
    with track(f"evaluate {'start' if index < 0 else index}", len(groups)) as advance:
        return score_groups(scorer, groups, micro_batch_tokens, parallel, advance)


def answers(
    iteration: Iteration, open_backend: OpenBackend, rows: Sequence[Rendered], parallel: Parallel, *, is_checked: bool
) -> tuple[list[Generation], list[Generation]]:
    """(sampled, greedy) responses to all rows; greedy ones only if they are checked."""
    settings = iteration.recipe.generate
    ranks = max(1, parallel.num_ranks // settings.tensor_parallel_size)  # each engine takes that many devices
    if parallel.num_ranks == 1:
        with open_backend(iteration.policy) as backend:
            fresh = answer(iteration, backend, rows, greedy=False)
            return fresh, answer(iteration, backend, rows, greedy=True) if is_checked else []
    # whole batches, so that responses do not depend on the number of ranks
    batch = settings.batch_size or 64
    order = sorted(rows, key=lambda row: (-len(row.prompt_ids), row.id))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    work = iteration.run.work(iteration.stage("evaluate"))
    kinds = (False, True) if is_checked else (False,)
    mine = [row for one in batches[parallel.rank :: ranks] for row in one] if parallel.rank < ranks else []
    if mine:
        with open_backend(iteration.policy) as backend:
            for greedy in kinds:
                drawn = answer(iteration, backend, mine, greedy=greedy)
                path = work / f"greedy-{greedy}-{parallel.rank}.parquet"
                commit_part(path, lambda p, d=drawn: write_generations(p, d, [""] * len(d)))
    parallel.barrier()
    found: list[list[Generation]] = [[], []]
    for greedy in kinds:
        by_id = {g.id: g for g in read_generations(sorted(work.glob(f"greedy-{greedy}-*.parquet")))}
        found[greedy] = [by_id[row.id] for row in rows]
    return found[0], found[1]


def answer(iteration: Iteration, backend: Backend, rows: Sequence[Rendered], *, greedy: bool) -> list[Generation]:
    """One response per row, in the order of `rows`."""
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
                raise RunError(
                    f"The engine could not respond to held-out row {generation.id}. Remove that row from the data."
                )
            found[generation.id] = generation
            advance(1, len(generation.token_ids))
    return [found[row.id] for row in rows]


class Answers:
    """The responses of an earlier evaluation, in the order of the held-out rows."""

    def __init__(self, table: pa.Table) -> None:
        self.token_ids = id_lists(table["token_ids"])
        self.finish: list[Finish] = table["finish"].to_pylist()
        self.logprob: np.ndarray = table["logprob"].to_numpy()
        self.real_logprob: np.ndarray = table["real_logprob"].to_numpy()
        self.proto_logprob: np.ndarray = table["proto_logprob"].to_numpy()

    def generations(self, rows: Sequence[Rendered]) -> list[Generation]:
        """As `join` takes them."""
        return [Generation(r.id, 0, ids, end) for r, ids, end in zip(rows, self.token_ids, self.finish, strict=True)]

    @staticmethod
    def read(folder: Path) -> Answers:
        return Answers(read_table(folder / "answers.parquet"))


def likelihood(rows: Sequence[Rendered], real_logprob: np.ndarray) -> dict[str, float]:
    """NLL of the real responses in nats per token, with its interval over prompts."""
    lengths = np.array([float(len(row.real_ids)) for row in rows])
    nll = estimate(-real_logprob.astype(np.float64), lengths, prompts(rows))
    return {**nll.named("held_out_nll"), "real_logprob": float(real_logprob.mean())}


def accuracy(name: str, rows: Sequence[Rendered], results: Sequence[float | None]) -> dict[str, float]:
    """Mean result of the checker over the rows that can be checked, with its interval over prompts."""
    values = np.array([np.nan if result is None else result for result in results])
    return estimate(values, clusters=prompts(rows), bounds=FRACTION).named(f"{name}_accuracy")


def prompts(rows: Sequence[Rendered]) -> np.ndarray:
    """The clusters of the intervals: rows of one prompt are not independent."""
    return np.array([row.prompt_key for row in rows])


def against_opponent(
    objective: Objective,
    rows: Sequence[Rendered],
    scores: dict[Role, np.ndarray],
    opponent: Answers,
    proto: Answers,
) -> dict[str, float]:
    """The policy against its opponent, on the opponent's responses to held-out prompts."""
    is_first = bool(np.isnan(opponent.proto_logprob).all())  # the opponent is the starting model
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
    per_row = self_play_metrics(objective, policy, theirs, lengths)
    gap = per_row["logps/real"] - per_row["logps/generated"]
    means = {name: values.double().mean().item() for name, values in per_row.items()}
    won, tied = (per_row[name].double().numpy() for name in ("rewards/accuracies", "rewards/ties"))
    return {
        **means,
        **estimate(won, clusters=prompts(rows), bounds=FRACTION).named("rewards/accuracies"),
        # wins minus losses, for the stop rule
        **estimate(2 * won + tied - 1, clusters=prompts(rows), bounds=DIFFERENCE).named("rewards/lead"),
        "advantages/current": gap.mean().item(),
        "advantages/history_logps": (per_row["logps/generated"] - per_row["logps/proto"]).mean().item(),
        **{f"quadrants/{name}": share for name, share in quadrants(per_row["rewards/margins"], gap).items()},
        # E over samples of q of log q - log p; exact for temperature 1 and top_p 1
        "kl_from_opponent": (theirs["generated"] - policy["generated"]).mean().item(),
        "kl_from_start": float((proto.logprob - scores["proto"]).mean()),
    }
