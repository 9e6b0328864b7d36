"""Trackers get the numbers of metrics.jsonl: one run for all iterations, also over a stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import sparring.run.tracking
from sparring.errors import UserError
from sparring.loop import play
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe
from sparring.run.results import Results
from sparring.run.tracking import TRL_NAMES, steps_before

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]


def test_tensorboard(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    play(make_recipe("spin", iterations=1, track=["tensorboard"], train={"epochs": 1}), tmp_path / "run")
    run = play(make_recipe("spin", iterations=2, track=["tensorboard"], train={"epochs": 1}), tmp_path / "run").run
    events = event_accumulator.EventAccumulator(str(run.root / "tensorboard" / "sparring"))
    events.Reload()
    results = Results(run.root)
    lines = [*results.training(0), *results.training(1)]
    assert steps_before(run, 1) == len(results.training(0)) < len(lines) == steps_before(run, 2)
    for ours, theirs in (("loss", "loss"), ("rewards/real", "rewards/chosen"), ("grad_norm", "grad_norm")):
        told = events.Scalars(f"train/{theirs}")
        assert [event.step for event in told] == list(range(1, len(lines) + 1))
        assert [event.value for event in told] == pytest.approx([line[ours] for line in lines], rel=1e-6)
    told = events.Scalars("eval/held_out_nll")
    assert [event.step for event in told] == [0, steps_before(run, 1), steps_before(run, 2)]
    expected = [metrics["held_out_nll"] for metrics in results.evaluations().values()]
    assert [event.value for event in told] == pytest.approx(expected, rel=1e-6)


def play_in_two_starts(make_recipe: MakeRecipe, tracker: str, root: Path) -> Results:
    """One iteration, and one more by the same command."""
    for iterations in (1, 2):
        play(make_recipe("spin", iterations=iterations, track=[tracker], train={"epochs": 1}), root)
    return Results(root)


def test_mlflow(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run over two starts, steps without gaps, iterations as a metric that goes from one evaluation to the next."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is an extra: pip install 'sparring[mlflow]'")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    results = play_in_two_starts(make_recipe, "mlflow", tmp_path / "run")
    play(make_recipe("sft", iterations=1, track=["mlflow"], train={"epochs": 1}), tmp_path / "other")
    client = mlflow.MlflowClient(uri)
    runs = mlflow.search_runs(experiment_names=["sparring"], output_format="list")
    assert sorted(run.info.run_name for run in runs) == ["other", "run"]
    run = next(run for run in runs if run.info.run_name == "run")
    assert run.data.params["train.epochs"] == "1" and run.data.params["method.name"] == "spin"
    lines = [*results.training(0), *results.training(1)]
    for ours, theirs in (("loss", "loss"), ("rewards/real", "rewards/chosen"), ("logps/generated", "logps/rejected")):
        told = client.get_metric_history(run.info.run_id, f"train/{theirs}")
        assert [point.step for point in told] == list(range(1, len(lines) + 1))
        assert [point.value for point in told] == pytest.approx([line[ours] for line in lines])
    axis = [(p.step, p.value) for p in client.get_metric_history(run.info.run_id, "iteration")]
    half = len(results.training(0))
    assert dict(axis)[0] == -1 and dict(axis)[half] == 0 and dict(axis)[len(lines)] == 1
    assert [value for _, value in axis] == sorted(value for _, value in axis)


def test_wandb(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the same run id in both starts, so that they become one run when they are synchronised."""
    pytest.importorskip("wandb", reason="wandb is an extra: pip install 'sparring[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    play_in_two_starts(make_recipe, "wandb", tmp_path / "run")
    kept = sorted(path.name for path in (tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(kept) == 2 and len({name.rpartition("-")[2] for name in kept}) == 1


def test_trackio(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """In a process of its own, since it reads at import where it keeps its files."""
    if find_spec("trackio") is None:
        pytest.skip("trackio is an extra: pip install 'sparring[trackio]'")
    recipe = make_recipe("sft", iterations=1, track=["trackio"], train={"epochs": 1})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "sparring.cli", "run", tmp_path / "recipe.yaml", tmp_path / "run"]
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio")}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert list((tmp_path / "trackio").rglob("*.db"))


def test_the_page_has_the_names_that_are_told() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tracking.md").read_text()
    for ours, theirs in TRL_NAMES.items():
        assert f"| `{ours}` | `{theirs}` |" in page


def test_a_tracker_changes_no_result_and_a_missing_one_is_named(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = play(make_recipe("sft", iterations=1, train={"epochs": 1}), tmp_path / "plain").run
    tracked = play(
        make_recipe("sft", iterations=1, train={"epochs": 1}, track=["tensorboard"]), tmp_path / "tracked"
    ).run
    assert plain.digest(plain.model(0)) == tracked.digest(tracked.model(0))
    assert not list(plain.root.rglob("*tfevents*")) and list(tracked.root.rglob("*tfevents*"))
    assert json.loads((tracked.stage(0, "evaluate") / "metrics.json").read_text())
    monkeypatch.setattr(sparring.run.tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="track: wandb is not installed. Run pip install 'wandb'"):
        play(make_recipe("sft", iterations=1, train={"epochs": 1}, track=["wandb"]), tmp_path / "plain")
