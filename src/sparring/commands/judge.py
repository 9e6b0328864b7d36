"""`sparring judge`: MT-Bench answers of two iterations, side by side, by a model behind an OpenAI-compatible endpoint.

Each pair is judged in both orders. A side wins that is preferred in both; everything else is a tie, and ties are kept.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from huggingface_hub import InferenceClient
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's, as the hub's version has it
    InferenceTimeoutError,
)

from sparring.errors import RunError, UserError
from sparring.logging import track
from sparring.run.disk import writing
from sparring.run.iteration import Iteration
from sparring.run.manifest import Json, begin_work, commit_folder, is_committed, replace_file, verified, write_json
from sparring.run.results import Results
from sparring.run.rundir import BENCHMARKS, JUDGED
from sparring.stages.evaluate.mt_bench import Question, read_questions

CONCURRENCY = 8
WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
VERDICT = re.compile(r"\[\[([ABC])\]\]")
Outcome = Literal["win", "tie", "loss", "unclear"]

SYSTEM = (
    "You compare two answers to the same request. Prefer the one that is more helpful, correct and to the point, and "
    "follows what was asked. Neither the order in which they stand, nor their length, nor their names may matter. Give "
    "a short reason, then your verdict as the last line, exactly one of [[A]], [[B]], or [[C]] for a tie."
)


@dataclass(frozen=True)
class Verdict:
    question_id: int
    turn: int
    is_swapped: bool  # the iteration's answer stands second
    verdict: str | None  # A, B or C; None: none was found
    text: str


def judge(
    results: Results,
    *,
    index: int,
    against: int,
    url: str,
    model: str,
    prompts: Path | None = None,
    references: Path | None = None,
) -> Json:
    """Writes judged/...: verdicts.jsonl and metrics.json, which is returned. Continues where it was stopped."""
    run, questions_path = results.run, results.recipe.evaluate.mt_bench
    if questions_path is None:
        raise UserError("judge: this run has no evaluate.mt_bench, which says where the questions are")
    if index == against:
        raise UserError(f"judge: iteration {index} against itself; give another --against")
    file = Path(questions_path).resolve()
    label = f"mt_bench-{file.stem}"
    folders = [answered(results, t, label) for t in (index, against)]
    slug = re.sub(r"[^\w.-]+", "-", model)
    final = run.root / JUDGED / f"{label}-{index}-against-{against}-by-{slug}"
    if is_committed(final):
        return json.loads(verified(final, "metrics.json").read_text(encoding="utf-8"))
    begun = time.monotonic()
    extra = [path.resolve() for path in (prompts, references) if path is not None]
    input_digests = run.input_digests(file, *folders, *extra)
    ours, theirs = (read_answers(verified(folder, "answers.jsonl")) for folder in folders)
    questions = read_questions(file)
    templates = read_prompts(prompts) if prompts else {}
    known = read_answers(references) if references else {}
    work = begin_work(run.work(final), input_digests)
    log = work / "verdicts.jsonl"
    found = {(v.question_id, v.turn, v.is_swapped): v for v in read_verdicts(log)}
    token = os.environ.get("OPENAI_API_KEY") or "none"  # with no word at all it would hand over the hub's token
    client = InferenceClient(base_url=url, token=token, timeout=600)
    wanted = [(q, turn, swap) for q in questions for turn in range(len(q.turns)) for swap in (False, True)]
    todo = [(q, turn, swap) for q, turn, swap in wanted if (q.id, turn, swap) not in found]

    def ask(question: Question, turn: int, is_swapped: bool) -> Verdict:
        pair = [ours[question.id], theirs[question.id]]
        first, second = reversed(pair) if is_swapped else pair
        messages = conversation(question, turn, first, second, templates, known.get(question.id))
        text = reply(client, model, messages)
        verdicts = VERDICT.findall(text)
        return Verdict(question.id, turn, is_swapped, verdicts[-1] if verdicts else None, text)

    with track(f"judge {index} against {against}", len(wanted)) as advance, log.open("a", encoding="utf-8") as lines:
        advance(len(found), 0)
        pool = ThreadPoolExecutor(CONCURRENCY)
        try:
            for future in as_completed([pool.submit(ask, *each) for each in todo]):
                verdict = future.result()
                found[verdict.question_id, verdict.turn, verdict.is_swapped] = verdict
                with writing(log):
                    lines.write(json.dumps(asdict(verdict), ensure_ascii=False) + "\n")
                    lines.flush()
                advance(1, 0)
        finally:
            pool.shutdown(cancel_futures=True)
    metrics = {"iteration": index, "against": against, "judge": model, **summary(questions, found)}
    with writing(final):
        write_json(work / "metrics.json", metrics)
    commit_folder(
        work, final, input_digests=input_digests, info={"seconds": time.monotonic() - begun, "rows": len(wanted)}
    )
    return metrics


def answered(results: Results, index: int, label: str) -> Path:
    if not -1 <= index < results.recipe.iterations:
        raise UserError(f"judge: there is no iteration {index}; -1 is the model that the run starts from")
    folder = Iteration(results.run, results.recipe.at(index), index).stage(f"{BENCHMARKS}/{label}")
    if not is_committed(folder):
        raise UserError(f"judge: iteration {index} has no answers yet ({folder}); the run's own command draws them")
    return folder


def read_answers(file: Path) -> dict[int, list[str]]:
    """Turns by question, from FastChat's form: question_id, choices[0].turns."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {int(row["question_id"]): [str(turn) for turn in row["choices"][0]["turns"]] for row in rows}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"judge: {file} holds no answers in FastChat's form: {type(error).__name__} {error}") from error


def read_prompts(file: Path) -> dict[str, dict[str, str]]:
    """FastChat's judge_prompts.jsonl: system_prompt and prompt_template by name."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = {str(row["name"]): {key: str(row[key]) for key in ("system_prompt", "prompt_template")} for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"judge: {file} holds no judge prompts: {type(error).__name__} {error}") from error
    if lacking := {"pair-v2", "pair-v2-multi-turn"} - set(found):
        raise UserError(f"judge: {file} has no prompt named {min(lacking)}")
    return found


def read_verdicts(log: Path) -> Iterator[Verdict]:
    """What an earlier start was told; a last line that was half written is asked for again."""
    if log.is_file():
        lines = log.read_text(encoding="utf-8").split("\n")
        for line in lines[:-1]:
            yield Verdict(**json.loads(line))
        if lines[-1]:
            replace_file(log, "".join(f"{line}\n" for line in lines[:-1]))


def conversation(
    question: Question,
    turn: int,
    first: Sequence[str],
    second: Sequence[str],
    templates: Mapping[str, Mapping[str, str]],
    reference: Sequence[str] | None,
) -> list[dict[str, str]]:
    """What the judge is shown: the turns up to this one of both sides, and a reference where there is one."""
    if templates:
        name = ("pair-math-v1" if reference else "pair-v2") + ("-multi-turn" if turn else "")
        if name not in templates:
            raise UserError(f"judge: the judge prompts have none named {name}, which references need")
        places = {"question": question.turns[0], "answer_a": first[0], "answer_b": second[0]}
        for number in range(turn + 1):
            places |= {
                f"question_{number + 1}": question.turns[number],
                f"answer_a_{number + 1}": first[number],
                f"answer_b_{number + 1}": second[number],
                f"ref_answer_{number + 1}": reference[number] if reference else "",
            }
        template = templates[name]
        system, text = template["system_prompt"], fill(template["prompt_template"], places)
    else:
        system, text = SYSTEM, plain(question, turn, first, second, reference)
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def fill(template: str, places: Mapping[str, str]) -> str:
    """Named places only: answers and templates may hold braces of their own."""
    return re.sub(r"\{(\w+)\}", lambda match: places.get(match[1], match[0]), template)


def plain(
    question: Question, turn: int, first: Sequence[str], second: Sequence[str], reference: Sequence[str] | None
) -> str:
    parts = []
    if reference:
        parts.append("\n\n".join(["## A reference answer", *reference[: turn + 1]]))
    for name, said in (("A", first), ("B", second)):
        parts.append(f"## Conversation {name}")
        for number in range(turn + 1):
            parts += [f"### Request\n\n{question.turns[number]}", f"### Answer {name}\n\n{said[number]}"]
    last = "Compare the last answers; what came before is their context." if turn else "Compare the answers."
    return "\n\n".join([*parts, f"## Your verdict\n\n{last}"])


def reply(client: InferenceClient, model: str, messages: list[dict[str, str]]) -> str:
    """The judge's words. Tried again while the server is busy, broken or unreachable."""
    problem = ""
    for pause in (*WAITS_SECONDS, None):
        try:
            answer = client.chat_completion(cast(Any, messages), model=model, temperature=0.0, max_tokens=2048, seed=0)
            return str(answer.choices[0].message.content or "")
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status != 429 and status < 500:
                raise UserError(
                    f"judge: the server answers {status}: {error}. Its token is read from OPENAI_API_KEY, and --model "
                    "must be a name that it serves"
                ) from error
            problem = str(error)
        except (OSError, InferenceTimeoutError, HTTPError) as error:
            problem = f"{type(error).__name__}: {error}"
        if pause is not None:
            time.sleep(pause)
    raise RunError(
        f"the judge did not answer in {len(WAITS_SECONDS) + 1} tries: {problem}. What it said so far is kept; the same "
        "command continues"
    )


def outcome(straight: Verdict, swapped: Verdict) -> Outcome:
    """Of the iteration that is judged, from both orders."""
    if straight.verdict is None or swapped.verdict is None:
        return "unclear"
    pair = straight.verdict + swapped.verdict
    return "win" if pair == "AB" else "loss" if pair == "BA" else "tie"


def summary(questions: Sequence[Question], found: Mapping[tuple[int, int, bool], Verdict]) -> dict[str, float]:
    """Shares over all pairs, and a score: wins and half of the ties, with its standard error over questions."""
    outcomes = {
        question.id: [
            outcome(found[question.id, turn, False], found[question.id, turn, True])
            for turn in range(len(question.turns))
        ]
        for question in questions
    }
    every = [each for turns in outcomes.values() for each in turns]
    value = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    scores = [np.mean(kept) for turns in outcomes.values() if (kept := [value[o] for o in turns if o != "unclear"])]
    changed = [
        found[id, turn, False].verdict == found[id, turn, True].verdict != "C"
        for id, turn, swap in found
        if not swap and found[id, turn, False].verdict is not None
    ]
    nothing = float("nan")
    return {
        "score": float(np.mean(scores)) if scores else nothing,
        "score_stderr": float(np.std(scores, ddof=1) / np.sqrt(len(scores))) if len(scores) > 1 else nothing,
        **{name: every.count(cast(Outcome, name)) / len(every) for name in ("win", "tie", "loss", "unclear")},
        "position_bias": float(np.mean(changed)) if changed else nothing,
    }
