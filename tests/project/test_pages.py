"""Pages whose tables come from numbers say what the numbers are."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def results_page() -> ModuleType:
    return load("results_page")


@pytest.mark.parametrize(("name", "mark"), [("step_page", "step"), ("results_page", "claims")])
def test_the_tables_are_those_of_the_numbers(name: str, mark: str) -> None:
    page = load(name)
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, f"python benchmarks/{name}.py"
    tables = re.findall(rf"<!-- {mark}: (.+?) -->\n(.+?)<!-- end -->", text, flags=re.DOTALL)
    assert tables and {name for name, _ in tables} <= set(page.TABLES)
    for _, lines in tables:  # a number that drifted is seen
        cell = re.findall(r"(?<![\d.])\d\.\d+", lines)[0]
        drifted = text.replace(lines, lines.replace(cell, "9.9999", 1), 1)
        assert drifted != text and page.filled(drifted) == text


def test_what_is_measured_of_the_step_has_a_table() -> None:
    page = load("step_page")
    marks = re.findall(r"<!-- step: (.+?) -->", page.PAGE.read_text(encoding="utf-8"))
    assert set(page.results()) <= {case for mark in marks for case in page.TABLES[mark][1]}


def test_every_claim_has_a_verdict(results_page: ModuleType) -> None:
    text = results_page.PAGE.read_text(encoding="utf-8")
    claims = re.split(r"^### \([a-f]\) ", text, flags=re.MULTILINE)[1:]
    assert len(claims) == 6
    assert all(re.match(r".+\n\n\*\*(Held|Did not hold|Cannot be told)", claim) for claim in claims)


def test_what_is_reported_was_not_played_on_what_chose(results_page: ModuleType) -> None:
    for task in results_page.numbers()["tasks"]:
        for arm in results_page.arms(task):
            seeds = results_page.reported(task, arm).keys()
            assert results_page.numbers()["sweep_seed"] not in seeds
