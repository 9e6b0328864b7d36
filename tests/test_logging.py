"""What people see while a run works: a bar on a terminal, plain lines in a log, and JSON lines when asked."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from sparring import logging
from sparring.loop import play
from sparring.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


def events(text: str) -> list[dict]:
    """Every line must be a JSON object with a time and a kind."""
    found = [json.loads(line) for line in text.splitlines()]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", e["time"]) and e["event"] for e in found)
    return found


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`wait(30)` moves the clock."""
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def move(seconds: float) -> None:
        now[0] += seconds

    return move


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logging.LOG_FORMAT, "json")


@pytest.mark.slow
def test_a_log_has_plain_lines(make_recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a terminal: one line per stage, no escape sequences, no JSON."""
    run = play(make_recipe("space", iterations=1, train={"epochs": 1}), tmp_path / "run").run
    printed = capfd.readouterr()
    assert printed.out == "", "results go to stdout, progress to stderr"
    assert "{" not in printed.err and "\x1b" not in printed.err
    lines = printed.err.splitlines()
    stages = [match[1] for line in lines if (match := re.match(r"(?:start|iteration 0): (\w+) \d", line))]
    assert stages == ["evaluate", "generate", "score", "train", "evaluate"]
    assert lines[-1] == f"Done. Report: {run.report}"


@pytest.mark.slow
@pytest.mark.usefixtures("as_json")
def test_a_json_log_has_one_object_per_line(
    make_recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a whole run, every line; each stage begins and ends once, and the numbers are those of the evaluation."""
    run = play(make_recipe("space", iterations=1, train={"epochs": 1}), tmp_path / "run").run
    said = capfd.readouterr()
    assert said.out == "", "results go to stdout, progress to stderr"
    found = events(said.err)
    stages = [(-1, "evaluate"), *((0, stage) for stage in ("generate", "score", "train", "evaluate"))]
    for kind in ("stage begins", "stage"):
        assert [(e["iteration"], e["stage"]) for e in found if e["event"] == kind] == stages
    begun, ended = (next(e for e in found if e["event"] == kind) for kind in ("run", "done"))
    assert (begun["method"], begun["iterations"], begun["training_rows"], begun["held_out_rows"]) == (
        "space",
        1,
        48,
        12,
    )
    assert ended["report"] == str(run.report)
    last = [e for e in found if e["event"] == "stage"][-1]
    assert last["metrics"] == json.loads((run.stage(0, "evaluate") / "metrics.json").read_text())
    assert last["message"].startswith("iteration 0: evaluate ") and last["seconds"] > 0


@pytest.mark.usefixtures("as_json")
def test_untrusted_text_stays_inside_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    logging.info('a "quoted"\nline \x1b[31m {"event": "forged"}\n')
    logging.info("")
    (only,) = events(capfd.readouterr().err)
    assert only["event"] == "message" and only["message"].startswith('a "quoted"\nline \\u001b[31m')


def test_a_log_has_a_progress_line_every_half_minute(
    wait: Callable[[float], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with logging.track("train 0", 1000) as advance:
        for _ in range(4):
            wait(15.6)
            advance(20, 310)
    assert capfd.readouterr().err.splitlines() == [
        "  train 0: 20 of 1,000, 20 tokens/s, 764 s left",
        "  train 0: 60 of 1,000, 20 tokens/s, 733 s left",
    ]


def test_the_first_line_counts_the_whole_first_batch(
    wait: Callable[[float], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """An engine hands over a batch at once. One answer in the batch's time would say that the rest takes for ever."""
    with logging.track("generate 0", 256) as advance:
        for _ in range(2):
            wait(34)
            for _ in range(64):
                advance(1, 20)
    assert capfd.readouterr().err.splitlines() == ["  generate 0: 64 of 256, 38 tokens/s, 102 s left"]


@pytest.mark.usefixtures("as_json")
def test_progress_lines_have_rate_and_time_left(
    wait: Callable[[float], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """At most one per half minute. What an earlier start had done is not part of the rate."""
    with logging.track("train 0", 100) as advance:
        advance(40, 0)  # an earlier start's
        for _ in range(4):
            wait(15.5)
            advance(10, 310)
    found = events(capfd.readouterr().err)
    assert [(e["event"], e["what"], e["done"], e["total"]) for e in found] == [
        ("progress", "train 0", 50, 100),
        ("progress", "train 0", 70, 100),
    ]
    assert [e["tokens_per_second"] for e in found] == [20.0, 20.0]
    assert [e["seconds_left"] for e in found] == pytest.approx([77.5, 46.5], abs=0.11), "10 in 15.5 s"


@pytest.mark.usefixtures("as_json")
def test_no_time_left_where_the_end_is_not_known(
    wait: Callable[[float], None], capfd: pytest.CaptureFixture[str]
) -> None:
    with logging.track("read rows.jsonl", None) as advance:
        for _ in range(2):
            wait(16)
            advance(5, 50)
    (only,) = events(capfd.readouterr().err)
    assert only["total"] is None and "seconds_left" not in only


def test_people_see_a_bar_and_plain_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(logging, "console", Console(file=screen, force_terminal=True, width=120))
    logging.info("a sentence", "stage", seconds=1.0)
    logging.log_event("stage begins", stage="train")
    with logging.track("train 0", 4) as advance:
        advance(2, 1000)
    shown = screen.getvalue()
    assert "a sentence\n" in shown and "{" not in re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown)
    assert "train 0" in shown and "2/4" in shown and "50%" in shown and "tokens/s" in shown


@pytest.mark.slow
def test_init_asks_for_what_is_not_given_on_a_terminal(tiny: Path, tmp_path: Path) -> None:
    """On a real pseudo-terminal: three questions, the default of the last taken."""
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "sparring.cli", "init", str(tmp_path / "r.yaml")]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, close_fds=True)
    os.close(terminal)
    said = b""

    def read_until(words: bytes) -> None:
        nonlocal said
        while words not in said:
            try:
                said += os.read(screen, 4096)
            except OSError:  # the other side is closed
                break
        assert words in said, said

    for question, answer in ((b"model", tiny / "model"), (b"rows", tiny / "rows.jsonl"), (b"method", "")):
        read_until(question)
        os.write(screen, f"{answer}\n".encode())
    read_until(b"Next: sparring doctor")
    assert process.wait(timeout=60) == 0
    os.close(screen)
    assert b"[tspin]" in said, "the default is shown"
    written = (tmp_path / "r.yaml").read_text()
    assert f"model: {tiny / 'model'}" in written and "name: tspin" in written
    assert f"train: {tiny / 'rows.jsonl'}" in written and "checker: number" in written
