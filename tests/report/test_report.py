"""The report renders at any point of a run, contains no foreign script or markup, and sends no request."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from html_checks import assert_inert, parse

import sparring.report
from sparring.data.tables import read_table
from sparring.errors import UserError
from sparring.loop import play
from sparring.recipe.schema import Recipe
from sparring.report import write_report
from sparring.report.bars import time_bars
from sparring.report.figures import running_mean
from sparring.report.samples import collect, display_text
from sparring.report.summary import headline_cards, summary
from sparring.report.warnings import classify_by_form, find_warnings, shortcut_accuracy
from sparring.run.estimate import DIFFERENCE, estimate
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.types import Generation, Rendered

MakeRecipe = Callable[..., Recipe]

PAYLOADS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "<iframe src=javascript:alert(1)></iframe>",
    "</pre></td></table><form action=//evil.example><input name=x>",
    "<a href='javascript:alert(1)'>x</a>",
    "<style>@import url(//evil.example/x.css)</style>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "{{ 7*7 }}{% for x in y %}",
    "<meta http-equiv=refresh content='0;url=//evil.example'>",
    "<!--<script>-->",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "\x1b]0;title\x07\x1b[31mred",
    "\u202eright to left\u2066",
    "<math><mtext></mtext><mglyph><style><img src=x onerror=alert(1)>",
]


def test_hostile_text_stays_text(make_recipe: MakeRecipe, tiny: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    hostile = [{"question": p, "answer": p + " #### 1"} for p in PAYLOADS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:20]))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(r) + "\n" for r in hostile))
    recipe = make_recipe(
        "spin",
        iterations=1,
        data={"train": str(tmp_path / "rows.jsonl"), "held_out": str(tmp_path / "held.jsonl"), "max_skipped": 1.0},
        generate={"max_new_tokens": 40},
        train={"epochs": 1},
    )
    name = "run <b onmouseover=alert(1)>"
    run = play(recipe, tmp_path / name).run
    html = run.report.read_text()
    elements = assert_inert(html)
    shown = "".join(elements.text)
    for payload in PAYLOADS:
        assert display_text(payload) in shown, payload
    assert name in shown
    assert "49" not in re.findall(r"row \d+: .*?(49)", shown), "templates in data are not rendered"
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", html)


def test_nothing_is_fetched_and_it_is_small(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = play(make_recipe("tspin", iterations=2, train={"epochs": 1}), tmp_path / "run").run
    html = run.report.read_text()
    assert_inert(html)
    namespaces = "http://www.w3.org|http://purl.org|http://creativecommons.org|https://matplotlib.org"
    assert not re.findall(rf"https?://(?!{namespaces.replace('http://', '').replace('https://', '')})[^\"' ]*", html)
    assert len(html) < 5_000_000


def test_the_same_run_gives_the_same_bytes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = play(make_recipe("space", iterations=1, train={"epochs": 1}), tmp_path / "run").run

    def text() -> str:
        return re.sub(r"Written by sparring .*", "", write_report(RunDir(run.root)).read_text())

    assert text() == text()


def test_it_renders_at_any_point_and_lists_what_is_missing(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Removes one stage after the other, from the end to the start."""
    run = play(make_recipe("tspin", iterations=2, train={"epochs": 1}), tmp_path / "run").run
    stages = Results(run.root).stages()
    for count, stage in enumerate(reversed(stages), start=1):
        folder = run.start if stage.iteration < 0 else run.iteration(stage.iteration)
        shutil.rmtree(folder / stage.stage)
        html = write_report(RunDir(run.root)).read_text()
        assert_inert(html)
        assert "Not finished" in html
        assert [s.state for s in Results(run.root).stages()].count("to do") == count
    shutil.rmtree(run.data)
    assert "has not read its data yet" in write_report(RunDir(run.root)).read_text()
    run.recipe.unlink()
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(RunDir(run.root))


def test_numbers_in_the_report_are_those_on_disk(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = play(make_recipe("space", iterations=2, train={"epochs": 1}), tmp_path / "run").run
    shown = "".join(parse(run.report.read_text()).text)
    for t in range(2):
        metrics = json.loads((run.stage(t, "evaluate") / "metrics.json").read_text())
        for name in ("held_out_nll", "sampled_accuracy", "rewards/margins", "length"):
            assert f"{metrics[name]:.4g}" in shown


def test_the_summary_does_not_oversell(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = play(make_recipe("space", iterations=1, train={"learning_rate": 1e-9}), tmp_path / "still").run
    text = summary(Results(run.root))
    assert "This may be chance" in text
    worse = play(make_recipe("spin", iterations=1, train={"learning_rate": 0.5, "epochs": 2}), tmp_path / "worse").run
    assert "No iteration improves the held-out NLL" in summary(Results(worse.root))
    assert {card.verdict for card in headline_cards(Results(worse.root))} <= {"worse", "no difference shown"}
    assert headline_cards(Results(worse.root))[0].verdict == "worse", "held-out NLL"
    assert headline_cards(Results(run.root))[0].verdict == "no difference shown"
    page = "".join(parse(worse.report.read_text()).text)
    assert "Warnings: the likelihood of real responses falls" in page


def test_time_bars_add_up(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = play(make_recipe("space", iterations=2, train={"epochs": 1}), tmp_path / "run").run
    results = Results(run.root)
    stages, within = time_bars(results)
    seconds = {(s.iteration, s.stage): s.seconds or 0 for s in results.stages()}
    assert [label for label, _, _ in stages.rows] == ["start", "iteration 0", "iteration 1"]
    assert sum(sum(parts) for _, parts, _ in stages.rows) == pytest.approx(sum(seconds.values()))
    for index, (_, parts, _) in enumerate(within.rows):
        steps = results.training(index)
        assert sum(parts) == pytest.approx(seconds[index, "train"])
        assert 0 < parts[1] == pytest.approx(sum(step["update_seconds"] for step in steps))
        assert all(step["update_seconds"] < step["seconds"] for step in steps)
    html = run.report.read_text()
    assert "Where the time went" in html and "Within training" in html


def test_running_means() -> None:
    assert running_mean(np.full(7, 3.0), 2) == pytest.approx([3.0] * 7)
    assert running_mean(np.array([0.0, 3.0, 6.0]), 1) == pytest.approx([1.5, 3.0, 4.5])
    assert running_mean(np.array([1.0, 2.0]), 0) == pytest.approx([1.0, 2.0])


def test_warnings_appear_where_they_should_and_nowhere_else(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """One random model trained with a huge learning rate, one with a tiny rate."""
    wild = play(make_recipe("spin", iterations=1, train={"learning_rate": 0.5, "epochs": 2}), tmp_path / "wild").run
    warnings = find_warnings(Results(wild.root))
    assert any(text.startswith("The likelihood of real responses falls: from the start to iter") for text in warnings)
    assert "likelihood of real responses falls" in wild.report.read_text()
    still = play(make_recipe("space", iterations=1, train={"learning_rate": 1e-9}), tmp_path / "still").run
    warnings = find_warnings(Results(still.root))
    assert [text.partition(":")[0] for text in warnings] == ["Iteration 0 has a shortcut"], "random responses never end"
    assert (accuracy := shortcut_accuracy(Results(still.root), 0)) is not None and accuracy > 0.9


def test_the_shortcut_classifier_is_at_chance_without_a_shortcut() -> None:
    """One distribution: half of the guesses are correct. Longer responses on one side: nearly all are."""
    random = np.random.default_rng(0)

    def pairs(factor: int) -> list[tuple[Rendered, Generation]]:
        result = []
        for row in range(400):
            real, drawn = (random.integers(5, 9, size=random.integers(4, 9) * f).astype(np.int32) for f in (1, factor))
            result.append((Rendered(str(row), row, real, real, "stop", "", ""), Generation(str(row), 0, drawn, "stop")))
        return result

    assert 0.42 < classify_by_form(pairs(1)) < 0.58
    assert classify_by_form(pairs(3)) > 0.95


def test_margins_of_samples_are_those_of_the_evaluation(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    for method in ("spin", "tspin"):
        run = play(make_recipe(method, iterations=2, train={"epochs": 1}), tmp_path / method).run
        results = Results(run.root)
        samples = collect(results)
        metrics = results.evaluations()[1]
        assert np.mean([s.margin for s in samples]) == pytest.approx(metrics["rewards/margins"], abs=1e-5)
        assert np.mean([not s.is_misaligned for s in samples]) == pytest.approx(metrics["alignment"], abs=1e-6)
        assert np.mean([not s.is_truncated for s in samples]) == pytest.approx(metrics["end_rate"])


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_wcag_aa_in_light_and_dark() -> None:
    """The colors in style.css: text at 4.5, graphics at 3. The browser test checks what is displayed."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    style = (Path(sparring.report.__file__).parent / "style.css").read_text()
    schemes = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for paper in ("paper", "card"):
            for ink in ("ink", "soft", "good", "bad", "warn", "link"):
                assert contrast(colors[ink], colors[paper]) >= 4.5, (ink, paper)
        for drawn in ("real", "generated", "proto", "fifth", "other", "rest"):
            assert contrast(colors[drawn], colors["paper"]) >= 3, drawn


def test_differences_are_paired_over_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Compared to the plain formulas: the change of the metrics, and the error of the row-wise differences."""
    run = play(make_recipe("sft", iterations=1, train={"learning_rate": 3e-3}), tmp_path / "run").run
    results = Results(run.root)
    before, after = results.evaluations()[-1], results.evaluations()[0]
    tables = [read_table(folder / "evaluate" / "answers.parquet") for folder in (run.start, run.iteration(0))]
    change = results.change("sampled_accuracy", -1, 0)
    assert change.mean == pytest.approx(after["sampled_accuracy"] - before["sampled_accuracy"])
    right = [np.array(table["correctness"].to_pylist(), dtype=float) for table in tables]
    assert change == estimate(right[1] - right[0], bounds=DIFFERENCE), "each row is a prompt of its own"
    change = results.change("held_out_nll", -1, 0)
    assert change.mean == pytest.approx(after["held_out_nll"] - before["held_out_nll"], abs=1e-5)
    assert change.low is not None and change.high is not None and change.low < change.mean < change.high
    assert change.high - change.low < sum(m["held_out_nll_high"] - m["held_out_nll_low"] for m in (before, after))


def test_long_texts_are_truncated_and_control_characters_visible() -> None:
    assert display_text("a\x1bb\u202ec") == "a\\u001bb\\u202ec"
    assert display_text("line\nnext\ttab") == "line\nnext\ttab"
    assert display_text("x" * 10_000).endswith("[...]") and len(display_text("x" * 10_000)) < 5_000
