"""docs/results.md says what benchmarks/results/claims.json holds."""

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
        import results_page  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return results_page


def test_the_tables_are_those_of_the_numbers(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.filled(text) == text, "python benchmarks/results_page.py"
    named = re.findall(r"<!-- claims: (.+?) -->", text)
    assert named and set(named) <= set(page.TABLES)


def test_a_number_that_drifted_is_seen(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    name = re.findall(r"<!-- claims: (curves, .+?) -->", text)[0]
    cell = re.findall(r"\d\.\d{3}", page.TABLES[name]()[2])[0]
    start = text.index(f"<!-- claims: {name} -->")
    drifted = text[:start] + text[start:].replace(cell, "0.999", 1)
    assert drifted != text and page.filled(drifted) == text


def test_every_claim_has_a_verdict(page: ModuleType) -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    claims = re.split(r"^### \([a-f]\) ", text, flags=re.MULTILINE)[1:]
    assert len(claims) == 6
    assert all(re.match(r".+\n\n\*\*(Held|Did not hold|Cannot be told)", claim) for claim in claims)


def test_what_is_reported_was_not_played_on_what_chose(page: ModuleType) -> None:
    for task in page.numbers()["tasks"]:
        for arm in page.arms(task):
            seeds = page.reported(task, arm).keys()
            assert page.numbers()["sweep_seed"] not in seeds
