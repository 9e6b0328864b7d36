"""The sample browser: held-out prompts, the real response, and the response of each iteration."""

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


def display_text(text: str) -> str:
    """Truncates a text and makes its control characters visible. Jinja escapes the result."""
    return escape_control(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " [...]")


@dataclass(frozen=True)
class Response:
    source: str  # "real", "start (proto)", "iteration 0", ...
    text: str
    num_tokens: int
    finish: str
    logprob: float | None = None  # under the model that generated it
    real_logprob: float | None = None  # of the real response, under the same model
    correctness: float | None = None  # what the recipe's checker returned, 0 to 1


@dataclass
class Sample:
    row: int
    prompt: str
    responses: list[Response]
    margin: float | None = None  # reward of the real response minus that of the opponent's, in the last iteration
    is_misaligned: bool = False  # reward and likelihood order the two differently
    is_truncated: bool = False  # the last response has no end token
    is_wrong: bool = False  # the last response fails the recipe's checker


def collect(results: Results) -> list[Sample]:
    """The first held-out rows with the response of every evaluated model."""
    if results.data is None:
        return []
    rows = read_rendered(verified(results.run.data, "held_out.parquet"))[:MAX_SAMPLES]
    samples = [
        Sample(row.row, row.prompt, [Response("real", row.real, len(row.real_ids), row.real_finish)]) for row in rows
    ]
    for iteration in results.iterations:
        folder = iteration.stage("evaluate")
        if not is_committed(folder):
            continue
        source = "start (proto)" if iteration.index < 0 else f"iteration {iteration.index}"
        table = read_table(verified(folder, "answers.parquet")).slice(0, len(rows))
        fields = ("finish", "logprob", "real_logprob", "correctness")
        for sample, record in zip(samples, table.to_pylist(), strict=True):
            rest = {name: record[name] for name in fields}
            sample.responses.append(Response(source, record["text"], len(record["token_ids"]), **rest))
            sample.is_truncated = record["finish"] == "length"
            sample.is_wrong = record["correctness"] not in (None, 1)
        if iteration.index >= 0 and is_committed(iteration.before().stage("evaluate")):
            add_margins(iteration, samples)
    return samples


def add_margins(iteration: Iteration, samples: Sequence[Sample]) -> None:
    """Sets the reward margins between this iteration's policy and its opponent."""
    tables = [read_table(step.stage("evaluate") / "answers.parquet") for step in (iteration, iteration.before())]
    policy, opponent = (table.slice(0, len(samples)) for table in tables)

    def column(table: pa.Table, name: str) -> torch.Tensor:
        return torch.from_numpy(table[name].to_numpy().copy())

    real = column(policy, "real_logprob"), column(opponent, "real_logprob")
    generated = column(policy, "opponent_logprob"), column(opponent, "logprob")
    real_lengths = torch.tensor([sample.responses[0].num_tokens for sample in samples])
    generated_lengths = torch.tensor([len(ids) for ids in opponent["token_ids"].to_pylist()])
    reward = iteration.recipe.method.reward
    margins = reward(*real, real_lengths) - reward(*generated, generated_lengths)
    advantages = real[0] - generated[0]
    for sample, margin, advantage in zip(samples, margins.tolist(), advantages.tolist(), strict=True):
        sample.margin, sample.is_misaligned = margin, margin * advantage < 0
