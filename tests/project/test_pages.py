"""Tables in README.md and docs/ equal the numbers that they show."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def page() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return import_module("page")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


def test_tables_equal_the_numbers_and_each_is_shown_once(page: ModuleType) -> None:
    texts = {str(path): path.read_text(encoding="utf-8") for path in page.PAGES}
    for name, text in texts.items():
        assert page.filled(text) == text, f"{name}: run python benchmarks/page.py"
    shown = re.findall(r"<!-- results: ([^>]+?) -->", "".join(texts.values()))
    assert sorted(shown) == sorted(page.TABLES)


def test_a_number_that_drifted_is_noticed(page: ModuleType) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    drifted = text.replace("0.614", "0.999", 1)
    assert drifted != text and page.filled(drifted) == text


def test_every_measured_step_has_a_table(page: ModuleType) -> None:
    assert set(page.results("step")["results"]) <= {case for _, cases in page.STEP_CASES.values() for case in cases}


def test_every_claim_has_a_verdict() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    verdicts = re.findall(r"^\| ([a-f]) \| .+ \| \*\*(?:held|held in part|did not hold)\*\*", text, flags=re.MULTILINE)
    assert verdicts == list("abcdef")


def test_seeds_that_chose_a_rate_are_not_reported(page: ModuleType) -> None:
    sweep_seed = page.results("claims")["sweep_seed"]
    for task in page.tasks():
        for arm in page.arms_of(task):
            assert sweep_seed not in page.reported(task, arm)
