"""What docs/results.md says of the steps beyond the papers is what benchmarks/results/beyond.json holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def beyond() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import beyond  # type: ignore[import-not-found]
        import beyond_page  # type: ignore[import-not-found]  # noqa: F401
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return beyond


@pytest.fixture(scope="module")
def beyond_page(beyond: ModuleType) -> ModuleType:
    return sys.modules["beyond_page"]


def test_the_tables_are_those_of_the_numbers(beyond_page: ModuleType) -> None:
    page, results = (path.read_text(encoding="utf-8") for path in (beyond_page.PAGE, beyond_page.RESULTS))
    assert beyond_page.filled(page, json.loads(results)) == page, "python benchmarks/beyond_page.py FOLDER"
    for name in json.loads(results)["experiments"]:
        assert f"<!-- beyond: {name} -->" in page
    drifted = page.replace("| plain | 0.", "| plain | 1.", 1)
    assert drifted != page and beyond_page.filled(drifted, json.loads(results)) == page


def test_an_adaptive_round_is_the_plain_one_in_expectation(beyond: ModuleType) -> None:
    """Rows drawn with unlike chances, weighted by share / chance: any sum over all rows comes out, on average."""
    random = np.random.default_rng(0)
    signal, losses, share = random.random(40) ** 3 + 1e-6, random.random(40), 0.25
    chances = beyond.proportional(signal, share)
    assert chances.mean() == pytest.approx(share) and chances.max() <= 1 and chances.min() >= 0.2 * share
    assert chances.max() > 5 * chances.min()
    drawn = [beyond.systematic(chances, seed) for seed in range(4000)]
    assert {len(rows) for rows in drawn} <= {10}
    found = [(losses[rows] * share / chances[rows]).sum() / share for rows in drawn]
    error = np.std(found) / len(found) ** 0.5
    assert np.mean(found) == pytest.approx(losses.sum(), abs=4 * error)
    unweighted = np.mean([losses[rows].sum() / share for rows in drawn])
    assert abs(unweighted - losses.sum()) > 4 * error
