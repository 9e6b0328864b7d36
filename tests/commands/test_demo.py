"""The demo: its problems are correct, and it runs end to end, here with fewer steps."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

import sparring.commands.demo
from sparring.commands.demo import make_tokenizer, play_demo, problem, problems
from sparring.data.formats import detect_format, examples
from sparring.data.render import Renderer
from sparring.run.results import Results


def test_solutions_are_correct() -> None:
    source = random.Random(0)
    kinds = set()
    for _ in range(2000):
        question, answer = problem(source, 12)
        step, result, final = re.fullmatch(r"(.+)=(\d+) #### (\d+)", answer).groups()  # type: ignore[union-attr]
        a, sign, b = re.fullmatch(r"(\d+)([-+*])(\d+)", step).groups()  # type: ignore[union-attr]
        assert int(result) == int(final) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        kind = re.sub(r"\d+|apples|books|cards|coins|eggs|pens|shells|stamps", "_", question)
        kinds.add(kind)
        first = {
            "_ _ and _ more, _ lost": numbers[0] + numbers[1],
            "_ boxes of _ _ and _ more": numbers[0] * numbers[1],
            "_ boxes of _ _, _ lost": numbers[0] * numbers[1],
            "_ _, _ lost, then times _": numbers[0] - numbers[1],
        }[kind]
        assert (int(a), int(b)) == (first, numbers[2])
        assert int(result) >= 0
    assert len(kinds) == 4


def test_problems_are_distinct_and_a_function_of_the_seed() -> None:
    rows = problems(500, 0, 9)
    assert len({row["question"] for row in rows}) == 500
    assert rows == problems(500, 0, 9) != problems(500, 1, 9)


def test_the_tokenizer_is_lossless() -> None:
    rows = problems(200, 0, 12)
    tokenizer = make_tokenizer(rows)
    render = Renderer(tokenizer, template=None, end_token=None, max_length=64, max_response=None)
    row_format = detect_format(rows[0], {}, None, "rows")
    for number, row in enumerate(rows):
        rendered = render(examples(row, number, row_format, "last")[0])
        assert tokenizer.decode(rendered.real_ids.tolist()) == row["answer"] + "<|end|>"
        assert tokenizer.decode(rendered.prompt_ids.tolist()) == f"<|user|>{row['question']}<|end|><|assistant|>"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparring.commands.demo, "NUM_TRAIN", 64)
    monkeypatch.setattr(sparring.commands.demo, "NUM_HELD_OUT", 32)
    monkeypatch.setattr(sparring.commands.demo, "ITERATIONS", 2)
    monkeypatch.setitem(sparring.commands.demo.START, "epochs", 2)
    monkeypatch.setitem(sparring.commands.demo.GAME, "epochs", 1)


@pytest.mark.usefixtures("short")
def test_the_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = play_demo(tmp_path / "demo")
    assert [run.name for run in runs] == ["tspin", "space", "spin", "sft"]
    starts = [Results(run).evaluations()[-1] for run in runs]
    assert all(start == starts[0] for start in starts), "all methods share the start"
    assert starts[0]["held_out_nll"] < Results(tmp_path / "demo" / "start").evaluations()[-1]["held_out_nll"] - 0.5
    printed = capsys.readouterr().out
    for word in ("start", "tspin", "space", "spin", "sft", "greedy accuracy", "report.html"):
        assert word in printed
    assert all((run / "report.html").is_file() for run in runs)
    assert play_demo(tmp_path / "demo", "space") == [tmp_path / "demo" / "space"], "finished work is not repeated"
