"""MT-Bench: two turns of answers in the run's own rendering, and a judge that is asked in both orders."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tenacity import wait_none

import sparring.commands.judge
import sparring.stages.evaluate.mt_bench
from sparring.commands.demo import make_model, make_tokenizer
from sparring.commands.judge import (
    Verdict,
    conversation,
    format_request,
    judge,
    outcome,
    read_prompts,
    read_responses,
    summarize,
)
from sparring.data.render import Renderer
from sparring.errors import RunError, UserError
from sparring.loop import play
from sparring.model.load import load_tokenizer, save_model
from sparring.recipe.schema import Recipe
from sparring.report import render
from sparring.run.estimate import FRACTION, estimate
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.stages.evaluate.mt_bench import NOTHING, Question, read_questions, turn_ids
from sparring.stages.generate.server import started_server

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
QUESTIONS = [
    {"question_id": 7, "category": "math", "turns": ["3 eggs and 4 more", "and 2 lost"]},
    {"question_id": 9, "category": "writing", "turns": ["5 eggs"]},
    {"question_id": 8, "category": "math", "turns": ["6 " * 200, "too long to be asked"]},
]


class Judge(ThreadingHTTPServer):
    """An endpoint that answers by a rule from what it is shown; `failures` of its first answers are 503."""

    def __init__(self, rule: Callable[[str], str], failures: int = 0) -> None:
        self.seen: list[dict[str, Any]] = []
        outer, left, lock = self, [failures], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append({"path": self.path, "token": self.headers["Authorization"], **body})
                    left[0] -= 1
                    fails = left[0] >= 0
                text = rule(body["messages"][-1]["content"])
                answer = {
                    "id": "1",
                    "object": "chat.completion",
                    "created": 1,
                    "model": body["model"],
                    "choices": [
                        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
                    ],
                }
                content = json.dumps(answer).encode()
                self.send_response(503 if fails else 200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(make_recipe: MakeRecipe, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    train = {"learning_rate": 3e-3, "epochs": 1}
    recipe = make_recipe("sft", data={"held_out": 0}, train=train, evaluate={"mt_bench": str(questions)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparring.stages.evaluate.mt_bench, "MAX_NEW_TOKENS", 9)
        return play(recipe, tmp_path_factory.mktemp("mt") / "run").run


def answers(run: RunDir, index: int) -> list[dict[str, Any]]:
    folder = (run.start if index < 0 else run.iteration(index)) / "benchmarks" / "mt_bench-question"
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_every_iteration_answers_every_turn(run: RunDir) -> None:
    for index in (-1, 0, 1):
        found = answers(run, index)
        assert [row["question_id"] for row in found] == [7, 9, 8]
        assert [len(row["choices"][0]["turns"]) for row in found] == [2, 1, 2]
        assert found[2]["choices"][0]["turns"] == ["", ""], "what does not fit is not answered"
    assert answers(run, 0)[0]["choices"] != answers(run, -1)[0]["choices"]
    assert Results(run.root).benchmarks()[("mt_bench-question", "failed")][0] == (2 / 5, "")


def test_the_second_turn_sees_the_first(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny / "model")
    question = Question(1, "", ("3 eggs", "2 lost"))
    chat = Renderer(tokenizer, template=None, end_token=None, max_length=64, max_response=None)
    ids = turn_ids(chat, question, ["5"], np.array([1], dtype=np.int32))
    assert tokenizer.decode(ids) == "<|user|>3 eggs<|end|><|assistant|>5<|end|><|user|>2 lost<|end|><|assistant|>"
    text = Renderer(tokenizer, template="<|user|>{prompt} more ", end_token="<|end|>", max_length=64, max_response=None)
    first = turn_ids(text, question, [], NOTHING)
    seen = np.concatenate([first, tokenizer(" 5<|end|>", return_tensors="np")["input_ids"][0].astype(np.int32)])
    assert tokenizer.decode(turn_ids(text, question, ["5"], seen)) == "<|user|>3 eggs more 5<|end|><|user|>2 lost more"
    assert len(turn_ids(chat, question, [""], NOTHING)) == 0, "no turn follows one that failed"


def longest(text: str) -> str:
    """Prefers the conversation with more words in it."""
    first, _, second = text.partition("## Conversation B")
    sizes = len(first.partition("## Conversation A")[2].split()), len(second.partition("## Your verdict")[0].split())
    return "because [[A]] or so: [[" + ("C" if sizes[0] == sizes[1] else "A" if sizes[0] > sizes[1] else "B") + "]]"


def test_a_judge_in_both_orders(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that goes by words is consistent; its verdicts are those of the words themselves."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = Judge(longest)
    found = judge(Results(run.root), index=1, against=-1, url=server.url, model="words/1")
    assert len(server.seen) == 2 * 5 and {seen["path"] for seen in server.seen} == {"/v1/chat/completions"}
    assert {seen["token"] for seen in server.seen} == {"Bearer secret"} and server.seen[0]["temperature"] == 0
    expected = []
    for ours, theirs in zip(answers(run, 1), answers(run, -1), strict=True):
        sides = [row["choices"][0]["turns"] for row in (ours, theirs)]
        for turn in range(len(sides[0])):
            a, b = (sum(len(text.split()) for text in side[: turn + 1]) for side in sides)
            expected.append("tie" if a == b else "win" if a > b else "loss")
    assert {name: found[name] for name in ("win", "tie", "loss", "unclear")} == {
        name: expected.count(name) / 5 for name in ("win", "tie", "loss", "unclear")
    }
    assert set(expected) > {"tie"}, "not all alike"
    assert found["position_bias"] == 0
    assert judge(Results(run.root), index=1, against=-1, url="http://127.0.0.1:9", model="words/1") == found, "kept"
    assert "MT-Bench by words/1" in render(run)


def test_a_judge_that_prefers_the_first_only_makes_ties(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Judge(lambda text: "[[A]]")
    found = judge(Results(run.root), index=0, against=-1, url=server.url, model="first")
    assert (found["tie"], found["score"], found["position_bias"]) == (1, 0.5, 1)
    assert {seen["token"] for seen in server.seen} == {"Bearer none"}, "no token of the hub is handed to a stranger"


def first_place(folder: Path) -> Path:
    """A model that says [[A]] and ends, whatever it is shown."""
    tokenizer = make_tokenizer([{"question": "[[A]]"}])
    tokenizer.add_tokens(["[[A]]"])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = make_model(tokenizer, width=32, layers=1, seed=0)
    model.config.max_position_embeddings = 8192
    says, ends = tokenizer.convert_tokens_to_ids(["[[A]]", tokenizer.eos_token])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        words = model.model.embed_tokens.weight  # the head, too
        words[:, 0] = 1.0
        words[says] = torch.nn.functional.one_hot(torch.tensor(1), 32).float()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(words))
    with torch.no_grad():
        model.lm_head.weight[says, 0] = model.lm_head.weight[ends, 1] = 1.0
    save_model(model, tokenizer, folder)
    return folder


SERVE = (
    f"{sys.executable} -m transformers.cli.transformers serve {{model}} --device cpu --host 127.0.0.1 --port {{port}} "
    "--dtype {dtype}"
)


def test_a_real_server_judges(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers serve`, with a model that prefers whatever stands first: heard in both orders, all are ties."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="transformers serve needs it: pip install 'transformers[serving]'")
    monkeypatch.setattr(sparring.commands.judge, "CONCURRENCY", 2)
    model = first_place(tmp_path / "judge")
    with started_server(SERVE, model, "float32") as (url, _):
        found = judge(Results(run.root), index=1, against=-1, url=f"{url}/v1", model=str(model))
    (folder,) = (run.root / "judged").glob("*-judge")
    verdicts = [json.loads(line) for line in (folder / "verdicts.jsonl").read_text().splitlines()]
    assert {(v["question_id"], v["turn"], v["is_swapped"]) for v in verdicts} == {
        (question["question_id"], turn, is_swapped)
        for question in QUESTIONS
        for turn in range(len(question["turns"]))
        for is_swapped in (False, True)
    }
    assert {(v["verdict"], v["text"]) for v in verdicts} == {("A", "[[A]]")}
    assert (found["win"], found["tie"], found["loss"], found["unclear"]) == (0, 1, 0, 0)
    assert (found["score"], found["position_bias"]) == (0.5, 1)


def test_a_busy_judge_is_asked_again_and_a_dead_one_later(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparring.commands.judge, "WAIT", wait_none())
    monkeypatch.setattr(sparring.commands.judge, "NUM_TRIES", 3)
    monkeypatch.setattr(sparring.commands.judge, "CONCURRENCY", 1)
    asked = 0

    def dies(text: str) -> str:
        nonlocal asked
        asked += 1
        if asked > 4:
            server.shutdown()
            server.server_close()
        return longest(text)

    server = Judge(dies, failures=2)
    with pytest.raises(RunError, match="the same command continues"):
        judge(Results(run.root), index=1, against=0, url=server.url, model="dies")
    (work,) = (run.root / "judged").glob(".*dies.partial")
    kept = (work / "verdicts.jsonl").read_text()
    assert 1 <= kept.count("\n") <= 3
    (work / "verdicts.jsonl").write_text(kept + '{"question_id": 7, "tu')
    again = Judge(longest)
    found = judge(Results(run.root), index=1, against=0, url=again.url, model="dies")
    assert len(again.seen) == 10 - kept.count("\n"), "what was said is not asked again"
    assert found["unclear"] == 0


def test_verdicts_and_scores() -> None:
    def pair(first: str | None, second: str | None) -> tuple[Verdict, Verdict]:
        return Verdict(1, 0, False, first, ""), Verdict(1, 0, True, second, "")

    expected = {("A", "B"): "win", ("B", "A"): "loss", ("A", "A"): "tie", ("B", "B"): "tie", ("C", "C"): "tie"}
    expected |= {("A", "C"): "tie", ("C", "A"): "tie", (None, "A"): "unclear", ("B", None): "unclear"}
    for (first, second), wanted in expected.items():
        assert outcome(*pair(first, second)) == wanted
    questions = [Question(i, "", ("a", "b")) for i in range(4)]
    verdicts = {0: "AB", 1: "BA", 2: "CC", 3: "AB"}
    found = {
        (i, turn, swap): Verdict(i, turn, swap, verdicts[i][int(swap)], "")
        for i in range(4)
        for turn in (0, 1)
        for swap in (False, True)
    }
    result = summarize(questions, found)
    scores = [1, 0, 0.5, 1]
    assert result["score"] == np.mean(scores)
    one_turn = estimate(np.array(scores), bounds=FRACTION)
    assert (result["score_low"], result["score_high"]) == (one_turn.low, one_turn.high), "two turns are one question"
    alone = summarize(questions[:1], found)
    assert alone["score"] == 1 and "score_low" not in alone, "one question has no interval"
    assert (result["win"], result["tie"], result["loss"]) == (0.5, 0.25, 0.25)


def test_what_the_judge_is_shown() -> None:
    question = Question(1, "math", ("one?", "two?"))
    text = format_request(question, 1, ["a1", "a2"], ["b1", "{b2}"], ["r1", "r2"])
    order = [text.index(words) for words in ("r1", "r2", "one?", "a1", "two?", "a2", "b1", "{b2}", "last answers")]
    assert order == sorted(order)
    assert "two?" not in format_request(question, 0, ["a1", "a2"], ["b1", "b2"], None)
    own = {"pair-v2": {"system_prompt": "S", "prompt_template": "{question} {answer_a} {answer_b} {x}"}}
    system, user = conversation(question, 0, ["{answer_b}"], ["b"], own, None)
    assert (system["content"], user["content"]) == ("S", "one? {answer_b} b {x}"), "answers are no templates"
    with pytest.raises(UserError, match="no prompt named pair-math-v1"):
        conversation(question, 0, ["a"], ["b"], own, ["r"])


def test_the_published_questions_and_prompts(shared: Path) -> None:
    """The 80 questions, eight prompts and thirty references of FastChat are read as they are."""
    found = read_questions(shared / "data" / "mt_bench" / "question.jsonl")
    assert len(found) == 80 and all(len(question.turns) == 2 for question in found)
    prompts = read_prompts(shared / "data" / "mt_bench" / "judge_prompts.jsonl")
    references = read_responses(shared / "data" / "mt_bench" / "reference_gpt-4.jsonl")
    assert len(references) == 30
    for question in found:
        for turn in (0, 1):
            _, user = conversation(question, turn, ["A1", "A2"], ["B1", "B2"], prompts, references.get(question.id))
            shown = user["content"]
            assert question.turns[turn] in shown and f"A{turn + 1}" in shown and f"B{turn + 1}" in shown
            if question.id in references:
                assert references[question.id][turn] in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "has no questions"), ("{}", "line 1 of .* KeyError 'question_id'|KeyError 'turns'"), ("x", "line 1")],
)
def test_bad_questions_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_questions(tmp_path / "q.jsonl")


def test_what_cannot_be_judged_is_refused(run: RunDir, tmp_path: Path) -> None:
    results = Results(run.root)
    for options, message in (
        ({"index": 5, "against": 0}, "iteration 5 does not exist"),
        ({"index": 1, "against": 1}, "must differ"),
        ({"index": 1, "against": 0, "prompts": tmp_path / "none"}, "does not contain judge prompts"),
    ):
        with pytest.raises((UserError, FileNotFoundError), match=message):
            judge(results, url="http://127.0.0.1:9", model="m", **options)  # pyright: ignore[reportArgumentType]
