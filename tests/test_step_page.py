"""docs/performance.md says what benchmarks/results/step.json holds."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import step_page  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return step_page


def test_the_tables_are_those_of_the_numbers(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "python benchmarks/step_page.py"
    named = re.findall(r"<!-- step: (.+?) -->", text)
    assert named and set(named) <= set(page.TABLES)


def test_a_number_that_drifted_is_seen(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    start = text.index("<!-- step: triplets -->")
    cell = re.findall(r"\d\.\d\d", page.table("triplets")[2])[0]
    drifted = text[:start] + text[start:].replace(cell, "9.99", 1)
    assert drifted != text and page.filled(drifted) == text


def test_what_is_measured_has_a_table(page: ModuleType) -> None:
    cases = {case for _, cases in page.TABLES.values() for case in cases}
    assert set(page.results()) <= cases
