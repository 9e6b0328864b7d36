"""The one join: rows, the generations of each iteration, and the opponent's scores, by row id.

Scoring, training, evaluation, export and the report all take what they read from here, so that a row that an engine
could not answer is left out in the same way everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from sparring.data.checkers import check_responses, make_check
from sparring.data.tables import read_candidates, read_generations, read_scores, read_table
from sparring.errors import NothingToTrainOn
from sparring.recipe.schema import Checker
from sparring.run.iteration import Iteration
from sparring.types import Generation, Group, Rendered, Role, TokenIds, TrainingExample


@dataclass(frozen=True)
class JoinedRow:
    """A row with its generated responses by iteration, each tuple in the order of samples."""

    row: Rendered
    generated: Mapping[int, tuple[Generation, ...]]
    proto: Generation | None = None

    def group(self, roles: Sequence[Role], iterations: Iterable[int]) -> Group:
        """The prompt with the responses of `roles`; the generated ones of all `iterations` together."""
        responses: dict[Role, tuple[TokenIds, ...]] = {
            "real": (self.row.real_ids,),
            "generated": tuple(answer.token_ids for t in iterations for answer in self.generated.get(t, ())),
            "proto": () if self.proto is None else (self.proto.token_ids,),
            "rejected": (self.row.rejected_ids,),
        }
        return Group(self.row.id, self.row.prompt_ids, {role: responses[role] for role in roles})


def join(
    rows: Iterable[Rendered],
    generated: Mapping[int, Iterable[Generation]],
    proto: Iterable[Generation] | None = None,
) -> list[JoinedRow]:
    """Joins rows with the generations of each iteration, in the order of `rows`.

    Leaves out rows that lack a sample in any iteration: an engine may have failed on them.
    """
    by_iteration = {t: _complete(answers) for t, answers in generated.items()}
    protos = None if proto is None else _complete(proto)
    return [
        JoinedRow(
            row,
            {t: answers[row.id] for t, answers in by_iteration.items()},
            None if protos is None else protos[row.id][0],
        )
        for row in rows
        if all(row.id in answers for answers in (*by_iteration.values(), *([] if protos is None else [protos])))
    ]


def read_joined(iteration: Iteration) -> list[JoinedRow]:
    """The training rows of an iteration with every response that its objective reads."""
    if iteration.recipe.method.needs.accepted:
        return [JoinedRow(row, {}) for row in accepted_rows(iteration)]
    roles = iteration.recipe.method.needs.roles
    iterations = iteration.rounds() if "generated" in roles else []
    proto = read_iteration(iteration, iteration.proto_round) if "proto" in roles else None
    return join(iteration.train_rows(), {t: read_iteration(iteration, t) for t in iterations}, proto)


def accepted_rows(iteration: Iteration) -> list[Rendered]:
    """The training rows with an accepted response of the opponent in place of the real one, once for each of them.

    Accepted is what has its end token and what evaluate.checker calls right, with a result of 1. Raises
    `NothingToTrainOn` if nothing is.
    """
    check = make_check(cast(Checker, iteration.recipe.evaluate.checker))
    paths = sorted(iteration.stage("generate").glob("part-*.parquet"))
    texts = [text for path in paths for text in read_table(path)["text"].to_pylist()]
    train_rows = {row.id: row for row in iteration.train_rows()}
    ended = [
        replace(train_rows[one.id], real_ids=one.token_ids, real=text, real_finish=one.finish)
        for one, text in zip(read_generations(paths), texts, strict=True)
        if one.finish == "stop" and one.id in train_rows
    ]
    results = check_responses(check, [one.real for one in ended], [train_rows[one.id] for one in ended])
    accepted: dict[str, dict[tuple[int, ...], Rendered]] = {id: {} for id in train_rows}
    for one, result in zip(ended, results, strict=True):
        if result == 1:
            accepted[one.id][tuple(one.real_ids)] = one
    rows = [one for of_row in accepted.values() for one in of_row.values()]
    if not rows:
        raise NothingToTrainOn(
            f"evaluate.checker accepts none of the opponent's {len(texts):,} responses, so "
            f"{iteration.recipe.method.name} has nothing to train on. Start from a model that answers some of the "
            "prompts, or raise generate.samples."
        )
    return rows


def read_iteration(iteration: Iteration, index: int) -> list[Generation]:
    """What iteration `index` of the same run generated."""
    return read_generations(sorted(iteration.run.stage(index, "generate").glob("part-*.parquet")))


def training_rows(iteration: Iteration) -> list[tuple[int, JoinedRow]]:
    """The training examples of an iteration: every row, once per iteration whose answers it is trained on.

    Objectives without generated responses have one per row, under iteration 0.
    """
    joined = read_joined(iteration)
    return [(t, one) for t in (joined[0].generated if joined else ()) or (0,) for one in joined]


def load_training_examples(iteration: Iteration) -> list[TrainingExample]:
    """The training examples of an iteration with the opponent's scores."""
    needs = iteration.recipe.method.needs
    if needs.teacher is not None:
        return load_taught_examples(iteration)
    scores = read_scores(iteration.stage("score") / "opponent.parquet") if needs.opponent else {}
    examples = []
    for t, one in training_rows(iteration):
        group = one.group(needs.roles, [t])
        opponent: dict[Role, np.ndarray] = {}
        for role in needs.roles if needs.opponent else ():
            found = [scores[one.row.id, role, t, sample] for sample in range(len(group.responses[role]))]
            opponent[role] = np.array(found if role == "generated" else found[0], dtype=np.float32)
        examples.append(TrainingExample(group, opponent))
    return examples


def load_taught_examples(iteration: Iteration) -> list[TrainingExample]:
    """The training examples of an iteration with the candidates and log-probs of its teacher."""
    scores = read_candidates(iteration.stage("score") / "teacher.parquet")
    examples = []
    for t, one in training_rows(iteration):
        group = one.group(iteration.recipe.method.needs.roles, [t])
        of_samples = [scores[one.row.id, t, sample] for sample in range(len(group.responses["generated"]))]
        candidates, logprobs = zip(*of_samples, strict=True)
        taught = replace(group, candidates={"generated": candidates})
        examples.append(TrainingExample(taught, {"generated": stack_padded(logprobs)}))
    return examples


def stack_padded(values: Sequence[np.ndarray | np.generic]) -> np.ndarray:
    """Stacks arrays; those of several dimensions may differ in the second to last, that of tokens, padded with 0."""
    arrays = [np.asarray(value) for value in values]
    if arrays[0].ndim < 2:
        return np.stack(arrays)
    longest = max(array.shape[-2] for array in arrays)
    return np.stack(
        [np.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, longest - array.shape[-2]), (0, 0)]) for array in arrays]
    )


def generated_inputs(iteration: Iteration) -> list[Path]:
    """The generate stages that `read_joined` reads, oldest first."""
    needs = iteration.recipe.method.needs
    iterations = set(iteration.rounds()) | ({iteration.proto_round} if "proto" in needs.roles else set())
    return [iteration.run.stage(t, "generate") for t in sorted(iterations)]


def _complete(generations: Iterable[Generation]) -> dict[str, tuple[Generation, ...]]:
    """By row id, in the order of samples; only rows that have as many samples as any other."""
    answers: dict[str, list[Generation]] = {}
    for generation in generations:
        answers.setdefault(generation.id, []).append(generation)
    samples = max((len(drawn) for drawn in answers.values()), default=0)
    return {id: tuple(drawn) for id, drawn in answers.items() if len(drawn) == samples}
