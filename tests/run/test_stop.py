"""The stop rule: when a run ends early, and that it ends there again when it is resumed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sparring.errors import UserError
from sparring.loop import play
from sparring.recipe.load import differences, make_recipe
from sparring.recipe.schema import Recipe
from sparring.report.summary import summary
from sparring.run.estimate import DIFFERENCE, estimate
from sparring.run.results import Results

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]


def test_a_run_that_declines_ends_and_stays_ended(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """At this rate every iteration makes the held-out answers less likely."""
    train = {"learning_rate": 0.3, "epochs": 1, "batch_size": 48}
    recipe = make_recipe("sft", iterations=4, train=train, stop={"decline": 2})
    run = play(recipe, tmp_path / "run").run
    results = Results(run.root)
    assert results.stopped == (1, "no better held_out_nll in 2 iterations")
    assert not run.iteration(2).exists()
    assert results.best() == -1
    assert all(stage.state == "done" for stage in results.stages()), "nothing is missing from a run that ended"
    assert "stopped early, after iteration 1" in summary(results) and "Not finished" not in run.report.read_text()
    written = run.report.stat().st_mtime_ns
    play(recipe, run.root)
    assert not run.iteration(2).exists() and run.report.stat().st_mtime_ns == written
    play(make_recipe("sft", iterations=3, train=train), run.root)  # without the rule it continues
    assert run.model(2).is_dir() and Results(run.root).stopped is None


def test_equilibrium_needs_level_play_flat_guards_and_enough_rows(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("space", iterations=2, train={"learning_rate": 1e-9, "epochs": 1}, stop={"equilibrium": True})
    run = play(recipe, tmp_path / "run").run  # a policy that hardly moves
    results = Results(run.root)
    assert results.is_flat("held_out_nll", 0) and results.is_flat("greedy_accuracy", 0)
    assert results.stopped is None, "12 rows are too few to call it an equilibrium"

    def lead(won: int, tied: int, lost: int) -> dict[str, float]:
        """As the evaluation of so many rows has it."""
        values = np.repeat([1.0, 0.0, -1.0], [won, tied, lost])
        return estimate(values, bounds=DIFFERENCE).named("rewards/lead")

    even = lead(490, 0, 510)
    assert results.is_level(even) and results.is_level(lead(0, 1000, 0))
    assert not results.is_level(lead(5, 1, 6)), "too few rows"
    assert not results.is_level(lead(550, 0, 450))
    assert not results.is_level(lead(200, 200, 600)), "ties are no wins"
    found = results.evaluations()
    assert -1 <= found[0]["rewards/lead_low"] <= found[0]["rewards/lead"] <= found[0]["rewards/lead_high"] <= 1
    monkeypatch.setattr(results, "evaluation", lambda index: found[index] | even)
    reason = results.reason_to_stop(0)
    assert reason is not None and "equilibrium" in reason


def test_stop_changes_no_result_and_needs_evaluations() -> None:
    raw: dict[str, object] = {"model": "m", "method": "spin", "data": {"train": "rows.jsonl"}}
    assert differences(make_recipe(raw), make_recipe({**raw, "stop": {"decline": 3, "equilibrium": True}})) == []
    with pytest.raises(UserError, match="stop needs held-out rows"):
        make_recipe({**raw, "stop": {"decline": 1}, "data": {"train": "rows.jsonl", "held_out": 0}})
