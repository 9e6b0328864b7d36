"""Trackers get the numbers of metrics.jsonl: one run for all iterations, also over a stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sparring.config import Recipe
from sparring.errors import Refused
from sparring.loop import play
from sparring.results import Results
from sparring.tracking import steps_before

MakeRecipe = Callable[..., Recipe]


def test_tensorboard(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    play(make_recipe("spin", iterations=1, track=["tensorboard"], train={"epochs": 1}), tmp_path / "run")
    run = play(make_recipe("spin", iterations=2, track=["tensorboard"], train={"epochs": 1}), tmp_path / "run")
    events = event_accumulator.EventAccumulator(str(run.root / "tensorboard" / "sparring"))
    events.Reload()
    results = Results(run.root)
    lines = [*results.training(0), *results.training(1)]
    assert steps_before(run, 1) == len(results.training(0)) < len(lines) == steps_before(run, 2)
    for ours, theirs in (("loss", "loss"), ("rewards/real", "rewards/chosen"), ("gradient_norm", "grad_norm")):
        told = events.Scalars(f"train/{theirs}")
        assert [event.step for event in told] == list(range(1, len(lines) + 1))
        assert [event.value for event in told] == pytest.approx([line[ours] for line in lines], rel=1e-6)
    told = events.Scalars("eval/held_out_nll")
    assert [event.step for event in told] == [0, steps_before(run, 1), steps_before(run, 2)]
    expected = [metrics["held_out_nll"] for metrics in results.evaluations().values()]
    assert [event.value for event in told] == pytest.approx(expected, rel=1e-6)


def test_a_tracker_changes_no_result_and_a_missing_one_is_named(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparring.distributed

    plain = play(make_recipe("sft", iterations=1, train={"epochs": 1}), tmp_path / "plain")
    tracked = play(make_recipe("sft", iterations=1, train={"epochs": 1}, track=["tensorboard"]), tmp_path / "tracked")
    assert plain.digest(plain.model(0)) == tracked.digest(tracked.model(0))
    assert not list(plain.root.rglob("*tfevents*")) and list(tracked.root.rglob("*tfevents*"))
    assert json.loads((tracked.stage(0, "evaluate") / "metrics.json").read_text())
    monkeypatch.setattr(sparring.distributed, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="track: wandb is not installed; pip install 'wandb'"):
        play(make_recipe("sft", iterations=1, train={"epochs": 1}, track=["wandb"]), tmp_path / "plain")
