"""Responses to the questions of MT-Bench (arXiv 2306.05685), two turns each, for a judge."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparring.data.read import BadRow
from sparring.data.render import Renderer
from sparring.errors import UserError
from sparring.logging import track
from sparring.model.load import decode_answers, load_tokenizer
from sparring.model.memory import peak_memory_mib
from sparring.parallel import local_device
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit, write_json
from sparring.run.rundir import BENCHMARKS
from sparring.types import Backend, Generation, Message, OpenBackend, Prompt, TokenIds

NOTHING = np.array([], dtype=np.int32)

MAX_NEW_TOKENS = 1024
"""Of one turn."""


@dataclass(frozen=True)
class Question:
    id: int
    category: str
    turns: tuple[str, ...]


def answer_questions(iteration: Iteration, open_backend: OpenBackend) -> None:
    """Writes benchmarks/mt_bench-.../: answers.jsonl, in FastChat's format, and metrics.json. Decodes greedily."""
    start = time.monotonic()
    file = questions_file(iteration)
    questions = read_questions(file)
    input_digests = iteration.run.input_digests(iteration.policy, file)
    responses, num_truncated, num_failed = converse(iteration, open_backend, questions)
    name = f"{iteration.run.root.name}-{'start' if iteration.index < 0 else iteration.index}"
    lines = [
        {
            "question_id": question.id,
            "category": question.category,
            "model_id": name,
            "choices": [{"index": 0, "turns": turns}],
        }
        for question, turns in zip(questions, responses, strict=True)
    ]
    summary = {
        "seconds": time.monotonic() - start,
        "rows": len(lines),
        "peak_memory_mib": peak_memory_mib(local_device()),
    }
    words = [len(response.split()) for turns in responses for response in turns]
    metrics = {"words": sum(words), "cut": num_truncated, "failed": num_failed}
    with commit(
        iteration.stage(f"{BENCHMARKS}/mt_bench-{file.stem}"), input_digests=input_digests, info=summary
    ) as folder:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "answers.jsonl").write_text(text, encoding="utf-8")
        write_json(folder / "metrics.json", {metric: value / len(words) for metric, value in metrics.items()})


def converse(
    iteration: Iteration, open_backend: OpenBackend, questions: Sequence[Question]
) -> tuple[list[list[str]], int, int]:
    """(responses to every turn of every question, number of truncated ones, number of failed ones)."""
    tokenizer = load_tokenizer(iteration.policy)
    render = Renderer(
        tokenizer,
        template=iteration.recipe.template,
        end_token=iteration.recipe.data.end_token,
        max_length=iteration.data.max_length,
        max_response=None,
        declared_ends=iteration.data.end_ids,
    )
    responses: list[list[str]] = [[] for _ in questions]
    context: list[TokenIds] = [NOTHING] * len(questions)
    num_truncated = num_failed = 0
    with open_backend(iteration.policy) as backend:
        for turn in range(max(len(question.turns) for question in questions)):
            prompts = {}
            asked = [place for place, question in enumerate(questions) if turn < len(question.turns)]
            for place in asked:
                question, ids = questions[place], turn_ids(render, questions[place], responses[place], context[place])
                room = min(MAX_NEW_TOKENS, iteration.data.max_length - len(ids))
                if len(ids) and room > 0:
                    seed = iteration.seed("mt_bench", question.id, turn)
                    prompts[place] = Prompt(str(question.id), turn, ids, room, seed)
            answers = draw(backend, prompts)
            for place in asked:
                answer = answers.get(place)
                if answer is None or answer.finish == "failed":
                    num_failed += 1
                    responses[place].append("")
                    context[place] = NOTHING
                    continue
                num_truncated += answer.finish == "length"
                responses[place].append(decode_answers(tokenizer, [answer])[0])
                context[place] = np.concatenate([prompts[place].token_ids, answer.token_ids])
    return responses, num_truncated, num_failed


def questions_file(iteration: Iteration) -> Path:
    assert iteration.recipe.evaluate.mt_bench is not None
    return Path(iteration.recipe.evaluate.mt_bench).resolve()


def read_questions(file: Path) -> list[Question]:
    if not file.is_file():
        raise UserError(
            f"evaluate.mt_bench: there is no file {file}. FastChat's is question.jsonl, with question_id, "
            "category and turns on each line."
        )
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            turns = tuple(str(turn) for turn in row["turns"])
            found.append(Question(int(row["question_id"]), str(row.get("category", "")), turns))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"evaluate.mt_bench: line {number} of {file} is not a question with question_id and turns: "
                f"{type(error).__name__} {error}"
            ) from error
    if not found or not all(question.turns for question in found):
        raise UserError(f"evaluate.mt_bench: {file} has no questions, or one without turns.")
    return found


def turn_ids(render: Renderer, question: Question, said: Sequence[str], seen: TokenIds) -> TokenIds:
    """Token ids of the prompt of the next turn, rendered like the run's rows; empty if it does not fit.

    A text template holds one turn: the next turn is rendered alone and appended to the tokens of the conversation.
    """
    if said and not len(seen):
        return NOTHING  # the previous turn has no response
    turns: list[Message] = []
    for asked, answered in zip(question.turns, said, strict=False):
        turns += [Message(role="user", content=asked), Message(role="assistant", content=answered)]
    last = Message(role="user", content=question.turns[len(said)])
    is_text = render.text_template is not None
    try:
        ids = np.array(render.prompt_ids([last] if is_text else [*turns, last]), dtype=np.int32)
    except BadRow:
        return NOTHING
    if is_text and said:
        ids = np.concatenate([seen, ids[len(render.bos_ids) :]])
    return ids if len(ids) < render.max_length else NOTHING


def draw(backend: Backend, prompts: dict[int, Prompt]) -> dict[int, Generation]:
    """Greedy responses by question index, in batches of similar length."""
    order = sorted(prompts, key=lambda place: -len(prompts[place].token_ids))
    found = {}
    with track("answer MT-Bench", len(order)) as advance:
        drawn = backend.generate([prompts[place] for place in order], greedy=True)
        for place, answer in zip(order, drawn, strict=True):
            found[place] = answer
            advance(1, len(answer.token_ids))
    return found
