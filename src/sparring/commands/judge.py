"""`sparring judge`: a judge model compares the MT-Bench responses of two iterations.

The judge is behind an OpenAI-compatible endpoint. It sees each pair in both orders. A side wins if it is preferred in
both; everything else is a tie.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from huggingface_hub import InferenceClient
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of httpx or httpx2, whichever huggingface_hub uses
    InferenceTimeoutError,
)
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from sparring.errors import RunError, UserError
from sparring.logging import track
from sparring.run.disk import writing
from sparring.run.estimate import FRACTION, estimate
from sparring.run.iteration import Iteration
from sparring.run.manifest import Json, begin_work, commit_folder, is_committed, replace_file, verified, write_json
from sparring.run.results import Results
from sparring.run.rundir import BENCHMARKS, JUDGED
from sparring.stages.evaluate.mt_bench import Question, read_questions

CONCURRENCY = 8
NUM_TRIES = 6
WAIT = wait_exponential(multiplier=1, max=16)
"""Between tries of a request: 1, 2, 4, ... seconds."""
VERDICT = re.compile(r"\[\[([ABC])\]\]")
Outcome = Literal["win", "tie", "loss", "unclear"]

SYSTEM = (
    "You compare two answers to the same request. Prefer the one that is more helpful, correct and to the point, and "
    "follows what was asked. Ignore the order, the length and the names of the answers. Give a short reason, then your "
    "verdict as the last line: exactly one of [[A]], [[B]], or [[C]] for a tie."
)

Request = tuple[Question, int, bool]  # question, turn, whether the order is swapped
Verdicts = dict[tuple[int, int, bool], "Verdict"]  # by question id, turn and order


@dataclass(frozen=True)
class Verdict:
    question_id: int
    turn: int
    is_swapped: bool  # the iteration's response comes second
    verdict: str | None  # A, B or C; None if the reply has none
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
    """Writes judged/.../verdicts.jsonl and metrics.json, and returns the metrics. Continues an interrupted call."""
    run, questions_path = results.run, results.recipe.evaluate.mt_bench
    if questions_path is None:
        raise UserError("judge: the run has no MT-Bench responses. Set evaluate.mt_bench to a file of questions.")
    if index == against:
        raise UserError(f"judge: --iteration and --against must differ (both are {index}).")
    file = Path(questions_path).resolve()
    label = f"mt_bench-{file.stem}"
    folders = [find_responses(results, t, label) for t in (index, against)]
    slug = re.sub(r"[^\w.-]+", "-", model)
    final = run.root / JUDGED / f"{label}-{index}-against-{against}-by-{slug}"
    if is_committed(final):
        return json.loads(verified(final, "metrics.json").read_text(encoding="utf-8"))
    start = time.monotonic()
    extra = [path.resolve() for path in (prompts, references) if path is not None]
    input_digests = run.input_digests(file, *folders, *extra)
    pair = [read_responses(verified(folder, "answers.jsonl")) for folder in folders]
    questions = read_questions(file)
    templates = read_prompts(prompts) if prompts else {}
    known = read_responses(references) if references else {}
    token = os.environ.get("OPENAI_API_KEY") or "none"  # with an empty token the client would send the Hub's
    client = InferenceClient(base_url=url, token=token, timeout=600)

    def ask(question: Question, turn: int, is_swapped: bool) -> Verdict:
        both = [responses[question.id] for responses in pair]
        first, second = reversed(both) if is_swapped else both
        messages = conversation(question, turn, first, second, templates, known.get(question.id))
        text = request_reply(client, model, messages)
        verdicts = VERDICT.findall(text)
        return Verdict(question.id, turn, is_swapped, verdicts[-1] if verdicts else None, text)

    work = begin_work(run.work(final), input_digests)
    requests = [
        (q, turn, is_swapped) for q in questions for turn in range(len(q.turns)) for is_swapped in (False, True)
    ]
    verdicts = collect_verdicts(requests, ask, work / "verdicts.jsonl", f"judge {index} against {against}")
    metrics = {"iteration": index, "against": against, "judge": model, **summarize(questions, verdicts)}
    with writing(final):
        write_json(work / "metrics.json", metrics)
    commit_folder(
        work, final, input_digests=input_digests, info={"seconds": time.monotonic() - start, "rows": len(requests)}
    )
    return metrics


def collect_verdicts(requests: Sequence[Request], ask: Callable[..., Verdict], log: Path, what: str) -> Verdicts:
    """Sends the requests that `log` has no verdict for, and appends each verdict to it."""
    verdicts = {(v.question_id, v.turn, v.is_swapped): v for v in read_verdicts(log)}
    missing = [request for request in requests if (request[0].id, *request[1:]) not in verdicts]
    with track(what, len(requests)) as advance, log.open("a", encoding="utf-8") as lines:
        advance(len(verdicts), 0)
        pool = ThreadPoolExecutor(CONCURRENCY)
        try:
            for future in as_completed([pool.submit(ask, *request) for request in missing]):
                verdict = future.result()
                verdicts[verdict.question_id, verdict.turn, verdict.is_swapped] = verdict
                with writing(log):
                    lines.write(json.dumps(asdict(verdict), ensure_ascii=False) + "\n")
                    lines.flush()
                advance(1, 0)
        finally:
            pool.shutdown(cancel_futures=True)
    return verdicts


def find_responses(results: Results, index: int, label: str) -> Path:
    """The folder with an iteration's MT-Bench responses."""
    if not -1 <= index < results.recipe.iterations:
        raise UserError(
            f"judge: iteration {index} does not exist. Use 0 to {results.recipe.iterations - 1}, or -1 for the "
            "starting model."
        )
    folder = Iteration(results.run, results.recipe.at(index), index).stage(f"{BENCHMARKS}/{label}")
    if not is_committed(folder):
        raise UserError(
            f"judge: iteration {index} has no MT-Bench responses yet ({folder}). Run 'sparring run' to generate them."
        )
    return folder


def read_lines(file: Path, content: str, parse: Callable[[Any], tuple[Any, Any]]) -> dict[Any, Any]:
    """Reads JSON lines as key-value pairs. `content` names what the file should contain."""
    try:
        return dict(parse(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"judge: {file} does not contain {content}: {type(error).__name__} {error}.") from error


def read_responses(file: Path) -> dict[int, list[str]]:
    """The turns of each question, in FastChat's format: question_id, choices[0].turns."""
    return read_lines(
        file,
        "responses in FastChat's format",
        lambda row: (int(row["question_id"]), [str(turn) for turn in row["choices"][0]["turns"]]),
    )


def read_prompts(file: Path) -> dict[str, dict[str, str]]:
    """FastChat's judge_prompts.jsonl: system_prompt and prompt_template by name."""
    prompts = read_lines(
        file,
        "judge prompts",
        lambda row: (str(row["name"]), {key: str(row[key]) for key in ("system_prompt", "prompt_template")}),
    )
    if missing := {"pair-v2", "pair-v2-multi-turn"} - set(prompts):
        raise UserError(f"judge: {file} has no prompt named {min(missing)}.")
    return prompts


def read_verdicts(log: Path) -> Iterator[Verdict]:
    """The verdicts of an interrupted call. Removes a last line that was only partly written."""
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
    """The judge's messages: the turns up to this one of both sides, and the reference if there is one."""
    if templates:
        name = ("pair-math-v1" if reference else "pair-v2") + ("-multi-turn" if turn else "")
        if name not in templates:
            raise UserError(f"judge: the judge prompts have no prompt named {name}, which references require.")
        fields = {"question": question.turns[0], "answer_a": first[0], "answer_b": second[0]}
        for number in range(turn + 1):
            fields |= {
                f"question_{number + 1}": question.turns[number],
                f"answer_a_{number + 1}": first[number],
                f"answer_b_{number + 1}": second[number],
                f"ref_answer_{number + 1}": reference[number] if reference else "",
            }
        template = templates[name]
        system, text = template["system_prompt"], fill(template["prompt_template"], fields)
    else:
        system, text = SYSTEM, format_request(question, turn, first, second, reference)
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def fill(template: str, fields: Mapping[str, str]) -> str:
    """Fills known fields only, because responses and templates may contain braces of their own."""
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


def format_request(
    question: Question, turn: int, first: Sequence[str], second: Sequence[str], reference: Sequence[str] | None
) -> str:
    """The user message without FastChat's prompts."""
    parts = []
    if reference:
        parts.append("\n\n".join(["## A reference answer", *reference[: turn + 1]]))
    for name, responses in (("A", first), ("B", second)):
        parts.append(f"## Conversation {name}")
        for number in range(turn + 1):
            parts += [f"### Request\n\n{question.turns[number]}", f"### Answer {name}\n\n{responses[number]}"]
    last = "Compare the last answers; what came before is their context." if turn else "Compare the answers."
    return "\n\n".join([*parts, f"## Your verdict\n\n{last}"])


def request_reply(client: InferenceClient, model: str, messages: list[dict[str, str]]) -> str:
    """The judge's reply. Retries while the server is busy, broken or unreachable."""
    retrying = Retrying(
        stop=stop_after_attempt(NUM_TRIES), wait=WAIT, retry=retry_if_exception(is_temporary), reraise=True
    )
    try:
        completion = retrying(
            client.chat_completion, cast(Any, messages), model=model, temperature=0.0, max_tokens=2048, seed=0
        )
    except (OSError, InferenceTimeoutError, HTTPError) as error:
        if not is_temporary(error):
            raise UserError(
                f"judge: the server rejects the request: {error}. Check the token in OPENAI_API_KEY, and that the "
                f"server has the model {model}."
            ) from error
        raise RunError(
            f"The judge did not reply in {NUM_TRIES} tries: {type(error).__name__}: {error}. Its verdicts so far are "
            "saved; the same command continues."
        ) from error
    return str(completion.choices[0].message.content or "")


def is_temporary(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, OSError | InferenceTimeoutError | HTTPError)


def outcome(straight: Verdict, swapped: Verdict) -> Outcome:
    """The iteration's outcome from both orders."""
    if straight.verdict is None or swapped.verdict is None:
        return "unclear"
    pair = straight.verdict + swapped.verdict
    return "win" if pair == "AB" else "loss" if pair == "BA" else "tie"


def summarize(questions: Sequence[Question], verdicts: Mapping[tuple[int, int, bool], Verdict]) -> dict[str, float]:
    """Fractions of all pairs, and a score: wins plus half of the ties, with its interval over questions."""
    pairs = {
        (q.id, turn): (verdicts[q.id, turn, False], verdicts[q.id, turn, True])
        for q in questions
        for turn in range(len(q.turns))
    }
    outcomes = {key: outcome(*pair) for key, pair in pairs.items()}
    value = {"win": 1.0, "tie": 0.5, "loss": 0.0}
    scored = [(str(id), value[o]) for (id, _), o in outcomes.items() if o in value]
    score = estimate(
        np.array([value for _, value in scored]), clusters=np.array([id for id, _ in scored]), bounds=FRACTION
    )
    biased = [
        straight.verdict == swapped.verdict != "C"
        for straight, swapped in pairs.values()
        if straight.verdict is not None
    ]
    counts = list(outcomes.values())
    return {
        **score.named("score"),
        **{name: counts.count(cast(Outcome, name)) / len(counts) for name in ("win", "tie", "loss", "unclear")},
        "position_bias": float(np.mean(biased)) if biased else float("nan"),
    }
