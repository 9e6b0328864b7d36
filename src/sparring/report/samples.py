"""The sample browser: held-out prompts with the real answer and what each iteration says to them."""

from __future__ import annotations

from dataclasses import dataclass

from sparring.commits import is_committed, verified
from sparring.data.tables import read_rendered, read_table
from sparring.results import Results
from sparring.visible import visible

MAX_SAMPLES = 60
MAX_CHARACTERS = 4000


def shown(text: str) -> str:
    """As much of a text as a person reads, with its control characters spelled out. Escaping is jinja's part."""
    return visible(text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " [...]")


@dataclass(frozen=True)
class Answer:
    source: str  # "real", "start (proto)", "iteration 0", ...
    text: str
    num_tokens: int
    finish: str
    logprob: float | None  # under the model that gave it
    real_logprob: float | None  # of the real answer, under the same model
    is_correct: bool | None


@dataclass(frozen=True)
class Sample:
    row: int
    prompt: str
    answers: list[Answer]


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
    return samples
