"""Checkers: what is right, what is refused before a run, and a run with a function of the user's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparring.commands.doctor import examine
from sparring.data.checkers import check_responses, make_check, number
from sparring.data.tables import read_rendered, read_table
from sparring.errors import RunMismatch, UserError
from sparring.loop import play
from sparring.recipe.schema import Function, JsonSchema, Recipe, Regex
from sparring.run.manifest import read_manifest
from sparring.types import Rendered

MakeRecipe = Callable[..., Recipe]
IDS = np.array([5], dtype=np.int32)


def row(real: str, source: str = "{}") -> Rendered:
    return Rendered("id", 7, IDS, IDS, "stop", "the prompt", real, source=source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2+2=4 #### 4", "4"),
        ("#### 1,234", "1234"),
        ("#### 1234.00", "1234"),
        ("#### $12.50.", "12.5"),
        ("#### -3", "-3"),
        ("#### 0", "0"),
        ("#### -0.0", "0"),
        ("#### .5", "0.5"),
        ("####72", "72"),
        ("#### 1\n#### 2", "2"),
        ("#### 100 apples", "100"),
        ("the answer is 4", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_the_number_after_the_mark(text: str, expected: str | None) -> None:
    assert number(text) == expected


def test_trailing_zeros_do_not_make_powers_of_ten() -> None:
    assert number("#### 100") == number("#### 100.0") == number("#### 1e2".replace("1e2", "100"))
    assert number("#### 100") != number("#### 10")


@pytest.mark.parametrize("text", ["3/4", "1 3/4", "2:45", "1e5", "2-3", "5 or 6", "1,2,3", "10^2"])
def test_what_is_no_single_number_is_not_compared_by_its_first(text: str) -> None:
    assert number(f"#### {text}") is None


@pytest.mark.parametrize("minus", ["-", "\u2212", "\u2013", "\uff0d", "- ", "-$", "\u2212 $"])
def test_every_minus_is_one(minus: str) -> None:
    assert number(f"#### {minus}5") == "-5" != number("#### 5")
    assert number("#### \uff11\uff12") == "12", "digits of full width"


def test_other_checkers() -> None:
    exact = make_check("exact")
    assert exact(" yes\n", row("yes")) == 1
    assert exact("Yes", row("yes")) == 0
    pattern = make_check(Regex(regex=r"answer is (\w+)"))
    assert pattern("answer is A, no: answer is B", row("The answer is B.")) == 1
    assert pattern("I do not know", row("The answer is B.")) == 0
    assert pattern("answer is B", row("nothing to compare with")) is None


def test_alternatives_of_a_pattern_compare_what_matched() -> None:
    """The first group of `B: (.)` is empty, and so is that of any other match of the second alternative."""
    check = make_check(Regex(regex=r"A: (\d)|B: (\d)"))
    assert check("B: 4", row("B: 5")) == 0
    assert check("B: 5", row("A: 5")) == 1
    assert check("A: 4", row("B: 5")) == 0
    assert make_check(Regex(regex=r"Answer: (.*)"))("Answer: ", row("Answer:  ")) is None, "nothing equals nothing"
    assert make_check(Regex(regex=r"yes|no"))("yes", row("no")) == 0


def test_mathematical_answers() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed: pip install 'sparring[math]'")
    check = make_check("math")
    assert check("It is 0.75.", row("$\\frac{3}{4}$")) == 1
    assert check("$\\frac{1}{2}$", row("$\\frac{3}{4}$")) == 0
    assert check("no idea", row("$-5$")) == 0
    assert check("5", row("no idea")) is None


def test_a_response_that_would_compute_forever_is_not_correct(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one is checked as if nothing had happened."""
    monkeypatch.setattr("sparring.data.checkers.find_spec", lambda name: name)
    monkeypatch.setattr("sparring.data.bounded.CPU_SECONDS", 0)
    monkeypatch.setattr("sparring.data.checkers._math_agrees", never_ends)
    check = make_check("math")
    assert check("9**9**9", row("1")) == 0
    assert check("1", row("1")) == 1


def never_ends(response: str, real: str) -> list[bool]:
    while response != real:
        pass
    return [True]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparring.data.checkers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sparring\[math\]'"):
        make_check("math")


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"n": 3}', 1),
        (' {"n": 3}\n', 1),
        ('{"n": 3.5}', 0),
        ('{"m": 3}', 0),
        ('```json\n{"n": 3}\n```', 0),
        ('{"n": 3} and more', 0),
        ('{"n": NaN}', 0),
        ("[" * 100_000, 0),
        ("9" * 5000, 0),
        ("", 0),
    ],
)
def test_json_of_a_schema(response: str, expected: float) -> None:
    assert make_check(JsonSchema(json_schema=SCHEMA))(response, row("not compared")) == expected


def test_an_invalid_schema_and_one_that_points_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"not a JSON Schema: 'integr' is not valid .* at \$\.properties\.n\.type"):
        make_check(JsonSchema(json_schema={"properties": {"n": {"type": "integr"}}}))

    def connect(*arguments: object, **options: object) -> None:
        raise AssertionError("nothing is fetched")

    monkeypatch.setattr("urllib.request.urlopen", connect)
    check = make_check(JsonSchema(json_schema={"$ref": "https://example.org/schema.json"}))
    with pytest.raises(Exception, match="Unresolvable"):
        check("{}", row("{}"))


LENIENT = """
from dataclasses import dataclass

@dataclass
class Wanted:
    text: str

def score(prompt, answer, row):
    wanted = Wanted(row["answer"].rpartition(" ")[2])
    row["answer"] = "changed"
    if answer == "breaks":
        raise KeyError("no such thing")
    if answer == "graded":
        return 0.25
    return answer.endswith(wanted.text) and prompt == "the prompt"
"""


def test_a_function_gets_prompt_answer_and_the_user_s_row(tmp_path: Path) -> None:
    (tmp_path / "checks.py").write_text(LENIENT)
    check = make_check(Function(function=f"{tmp_path}/checks.py:score"))
    one = row("", json.dumps({"answer": "it is 12"}))
    assert [check(answer, one) for answer in ("so 12", "so 13", "graded", "so 12")] == [1, 0, 0.25, 1], "a fresh row"


def test_a_response_on_which_a_function_fails_is_wrong_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checks.py").write_text(LENIENT)
    check = make_check(Function(function=f"{tmp_path}/checks.py:score"))
    rows = [row("", json.dumps({"answer": "it is 12"}))] * 3
    assert check_responses(check, ["so 12", "breaks", "breaks"], rows) == [1, 0, 0]
    said = capsys.readouterr()
    assert "failed on 2 responses, which count as wrong: KeyError: 'no such thing', on a response to row 7" in (
        said.out + said.err
    )


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("none.py:score", "", "cannot be imported: FileNotFoundError"),
        ("checks.py:scor", "def score(): pass", "cannot be imported: AttributeError: .*'scor'"),
        ("checks.py:score", "import nothing_like_it", "cannot be imported: ModuleNotFoundError: No module named"),
        ("checks.py:score", "def score(:", "cannot be imported: SyntaxError"),
        ("checks.py:score", "score = 3", "is no function with a source file"),
        ("no_such_module:score", "", "cannot be imported: ModuleNotFoundError"),
        ("builtins:len", "", "is no function with a source file"),
    ],
)
def test_other_things_than_functions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, message: str
) -> None:
    (tmp_path / "checks.py").write_text(code)
    with pytest.raises(UserError, match=message):
        make_check(Function(function=f"{tmp_path}/{name}" if ".py" in name else name))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.5", "fails on the real response of row .*: ValueError: it returned 1.5, not a number from 0 to 1"),
        ("return None", "it returned None, not a number"),
        ("return 'right'", "it returned 'right', not a number"),
        ("return float('nan')", "it returned nan, not a number"),
        ("return row['solution'] == answer", "KeyError: 'solution'"),
        ("return 0", "finds no right answer in any of"),
    ],
)
def test_a_function_is_tried_on_real_responses_before_a_run(
    make_recipe: MakeRecipe, tmp_path: Path, body: str, message: str
) -> None:
    (tmp_path / "checks.py").write_text(f"def score(prompt, answer, row):\n    {body}\n")
    recipe = make_recipe(evaluate={"checker": {"function": f"{tmp_path}/checks.py:score"}})
    with pytest.raises(UserError, match=message):
        play(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "start").exists()
    assert any(finding.level == "bad" and body not in finding.text for finding in examine(recipe)), "doctor too"


def test_a_run_with_a_function(make_recipe: MakeRecipe, tiny: Path, tmp_path: Path) -> None:
    """Evaluate uses it, the record has its hash, and another function is another run."""
    file = tmp_path / "checks.py"
    file.write_text(
        "def score(prompt, answer, row):\n    return 1 if answer == row['answer'] else len(answer) % 2 / 2\n"
    )
    recipe = make_recipe("sft", iterations=1, evaluate={"checker": {"function": f"{file}:score"}})
    run = play(recipe, tmp_path / "run").run
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    held_out = read_rendered(run.data / "held_out.parquet")
    assert [json.loads(one.source) for one in held_out] == [rows[one.row - 1] for one in held_out]
    answers = read_table(run.stage(0, "evaluate") / "answers.parquet").to_pylist()
    expected = [len(answer["text"]) % 2 / 2 for answer in answers if answer["text"]]
    assert [answer["correctness"] for answer in answers if answer["text"]] == expected and 0.5 in expected
    metrics = json.loads((run.stage(0, "evaluate") / "metrics.json").read_text())
    assert metrics["sampled_accuracy"] == pytest.approx(np.mean([answer["correctness"] for answer in answers]))
    assert str(file) in read_manifest(run.data).input_digests and f"{file}:score" in run.recipe.read_text()
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(RunMismatch, match=r"checks\.py has changed since"):
        play(recipe, tmp_path / "run")
