"""Untrusted text is displayed and never interpreted: by a browser, a parser or a terminal."""

from __future__ import annotations

import html as markup
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from html_checks import assert_inert
from rich.console import Console

from sparring import logging
from sparring.cli import main
from sparring.commands.status import print_status
from sparring.data.tables import read_table
from sparring.errors import UserError
from sparring.logging import escape_control
from sparring.loop import play
from sparring.report import write_report
from sparring.run.manifest import commit, read_manifest
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.stages.evaluate.held_out import ANSWERS

from .payloads import JS, MARK, PAYLOADS, TERMINAL

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NAME = "run <img src=x onerror=alert(1)> \x1b[31m"
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def hostile(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with every payload as a prompt, a real response, a model's response, a skip reason and in names."""
    folder = tmp_path_factory.mktemp("hostile")
    turns = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": p + " #### 1"}]}
        for p in PAYLOADS
    ]
    wizards = [{"messages": [{"role": p, "content": "x"}]} for p in PAYLOADS]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*turns, *wizards)))
    run = play(
        _recipe(folder, tiny),
        folder / NAME,
        [f"data.held_out={json.dumps(str(folder / 'held.jsonl'))}"],
    ).run
    for evaluation in (run.start / "evaluate", run.stage(0, "evaluate")):
        rewrite_answers(evaluation)
    return run


def _recipe(folder: Path, tiny: Path) -> Path:
    recipe = {
        "model": str(tiny / "model"),
        "method": "sft",
        "iterations": 1,
        "data": {"train": str(tiny / "rows.jsonl"), "limit": 16, "max_skipped": 1.0},
        "generate": {"max_new_tokens": 2},
        "train": {"epochs": 1, "dtype": "float32", "max_length": 128},
        "threads": 1,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


def rewrite_answers(folder: Path) -> None:
    """Replaces the model's responses by the payloads, committed as a stage commits them."""
    manifest = read_manifest(folder)
    table = read_table(folder / "answers.parquet")
    texts = [PAYLOADS[i % len(PAYLOADS)] for i in range(len(table))]
    at = table.schema.get_field_index("text")
    table = table.set_column(at, ANSWERS.field("text"), pa.array(texts, pa.string()))
    metrics = (folder / "metrics.json").read_bytes()
    shutil.rmtree(folder)
    with commit(folder, input_digests=manifest.input_digests, info=manifest.info) as work:
        pq.write_table(table, work / "answers.parquet")
        (work / "metrics.json").write_bytes(metrics)


@pytest.fixture
def all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparring.report.samples.MAX_SAMPLES", 10_000)


def test_there_are_enough_payloads() -> None:
    assert len(set(PAYLOADS)) == len(PAYLOADS) >= 60


@pytest.mark.usefixtures("all_samples")
def test_a_parsed_report_contains_only_our_own_elements(hostile: RunDir) -> None:
    html = write_report(hostile).read_text()
    shown = "".join(assert_inert(html).text)
    held_out = Results(hostile.root).data
    assert held_out is not None and held_out.num_held_out >= 60
    for payload in PAYLOADS:
        assert shown.count(escape_control(payload)) >= 2, (
            payload
        )  # as a prompt or a real answer, and as a model's answer
    assert escape_control(NAME) in shown
    assert "unknown role" in shown
    assert not CONTROLS.search(html)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.usefixtures("all_samples")
def test_a_browser_executes_nothing(hostile: RunDir, tmp_path: Path) -> None:
    """Even without the content security policy. As a control, the raw payloads do execute."""
    html = write_report(hostile).read_text().replace("<details>", "<details open>")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy".*?>', html)
    assert policy
    raw = f"<!doctype html><html><body>{''.join(p for p in PAYLOADS if JS in p)}</body></html>"
    pages = {"report": html, "unlocked": html.replace(policy[0], ""), "raw": raw}
    owned = {}
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text)
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                   f"--user-data-dir={tmp_path / name}", "--virtual-time-budget=2000", "--dump-dom",
                   (tmp_path / f"{name}.html").as_uri()]  # fmt: skip
        dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        assert "</html>" in dom
        owned[name] = re.search(f"<html[^>]*{MARK}", dom) is not None
        if name != "raw":
            elements = set(re.findall(r"<([a-zA-Z][\w:-]*)", re.sub(r"<svg.*?</svg>", "", dom, flags=re.DOTALL)))
            assert dom.count("<script") == 1, "the report's own, which filters and searches"
            assert not elements & {"img", "iframe", "object", "embed", "form", "link", "base", "video", "x"}
            assert markup.unescape(dom).count(JS) >= len([p for p in PAYLOADS if JS in p])
    assert owned == {"report": False, "unlocked": False, "raw": True}


def test_a_terminal_gets_no_escape_sequences(
    hostile: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Progress, status and error messages, as a terminal would get them."""
    assert len(TERMINAL) >= 4
    for payload in TERMINAL:
        screen = io.StringIO()
        monkeypatch.setattr(logging, "console", Console(file=screen, force_terminal=True, width=10_000))
        logging.info(f"the model says {payload} [bold]and[/bold] [link=http://x]this[/link]")
        assert not CONTROLS.search(screen.getvalue().replace("\n", "")), payload
        assert "[bold]and[/bold]" in screen.getvalue()
    print_status(Results(hostile.root))
    assert "\x1b[31m" not in capsys.readouterr().out

    def refuse() -> None:
        raise UserError("data: " + "".join(TERMINAL))

    monkeypatch.setattr("sparring.cli.app", refuse)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # so that colors are not stripped
    with pytest.raises(SystemExit):
        main()
    output = capsys.readouterr().err
    for ours in ("\x1b[31m", "\x1b[0m"):  # the color of the message itself, at both ends
        output = output.replace(ours, "", 1)
    assert "\\u001b]0;title" in output and not CONTROLS.search(output)
