"""The sample browser: held-out prompts with the real answer and what each iteration says to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from sparring.data.tables import read_rendered, read_table
from sparring.logging import escape_control
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed, verified
from sparring.run.results import Results

MAX_SAMPLES = 60
MAX_CHARACTERS = 4000


def shown(text: str) -> str:
    """As much of a text as a person reads, with its control characters spelled out. Escaping is jinja's part."""
    return escape_control(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " [...]")


@dataclass(frozen=True)
class Answer:
    source: str  # "real", "start (proto)", "iteration 0", ...
    text: str
    num_tokens: int
    finish: str
    logprob: float | None  # under the model that gave it
    real_logprob: float | None  # of the real answer, under the same model
    is_correct: bool | None


@dataclass
class Sample:
    row: int
    prompt: str
    answers: list[Answer]
    margin: float | None = None  # reward of the real answer minus that of the opponent's, in the last iteration
    is_misaligned: bool = False  # reward and likelihood order the two differently
    is_cut: bool = False  # the last answer has no end token
    is_wrong: bool = False  # the last answer is not right, by the recipe's checker


def collect(results: Results) -> list[Sample]:
    """The first held-out rows with every evaluated model's answer."""
    if results.data is None:
        return []
    rows = read_rendered(verified(results.run.data, "held_out.parquet"))[:MAX_SAMPLES]
    samples = [
        Sample(row.row, row.prompt, [Answer("real", row.real, len(row.real_ids), row.real_finish, None, None, None)])
        for row in rows
    ]
    for iteration in results.iterations:
        folder = iteration.stage("evaluate")
        if not is_committed(folder):
            continue
        source = "start (proto)" if iteration.index < 0 else f"iteration {iteration.index}"
        answers = read_table(verified(folder, "answers.parquet")).slice(0, len(rows)).to_pylist()
        for sample, answer in zip(samples, answers, strict=True):
            sample.answers.append(
                Answer(
                    source,
                    answer["text"],
                    len(answer["token_ids"]),
                    answer["finish"],
                    answer["logprob"],
                    answer["real_logprob"],
                    answer["is_correct"],
                )
            )
        for sample in samples:
            sample.is_cut = sample.answers[-1].finish == "length"
            sample.is_wrong = sample.answers[-1].is_correct is False
        if iteration.index >= 0 and is_committed(iteration.before().stage("evaluate")):
            judge(results, iteration, samples)
    return samples


def judge(results: Results, iteration: Iteration, samples: Sequence[Sample]) -> None:
    """Margins of the game between this iteration's policy and its opponent."""
    tables = [read_table(step.stage("evaluate") / "answers.parquet") for step in (iteration, iteration.before())]
    policy, opponent = (table.slice(0, len(samples)) for table in tables)

    def column(table: pa.Table, name: str) -> torch.Tensor:
        return torch.from_numpy(table[name].to_numpy().copy())

    real = column(policy, "real_logprob"), column(opponent, "real_logprob")
    theirs = column(policy, "opponent_logprob"), column(opponent, "logprob")
    lengths = (
        torch.tensor([sample.answers[0].num_tokens for sample in samples]),
        torch.tensor([len(ids) for ids in opponent["token_ids"].to_pylist()]),
    )
    reward = iteration.recipe.method.reward
    margins = reward(*real, lengths[0]) - reward(*theirs, lengths[1])
    gaps = real[0] - theirs[0]
    for sample, margin, gap in zip(samples, margins.tolist(), gaps.tolist(), strict=True):
        sample.margin, sample.is_misaligned = margin, margin * gap < 0
