"""Sends numbers to trackers, under TRL's names, on one axis of optimizer steps over all iterations.

metrics.jsonl and metrics.json stay the record; a tracker is a second reader.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import xxhash
from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from sparring.errors import UserError
from sparring.recipe.load import flatten
from sparring.run.disk import writing
from sparring.run.iteration import Iteration
from sparring.run.manifest import read_manifest
from sparring.run.rundir import RunDir

PROJECT = "sparring"
"""The project, or experiment, of every tracker."""

MLFLOW_TAG = "sparring.run"

TRL_NAMES = {
    "rewards/real": "rewards/chosen",
    "rewards/generated": "rewards/rejected",
    "logps/real": "logps/chosen",
    "logps/generated": "logps/rejected",
}
"""What TRL's DPOTrainer calls the same numbers."""


@dataclass(frozen=True)
class Tracker:
    """Where steps and evaluations go: the trackers of a run, or nowhere."""

    accelerator: Accelerator | None = None

    def step(self, iteration: Iteration, line: Mapping[str, float], steps_before: int) -> None:
        """A line of metrics.jsonl. `iteration` rises from t - 1 to t during iteration t, so its evaluation is last."""
        progress = line["epoch"] / iteration.recipe.train.epochs
        metrics = {name: value for name, value in line.items() if name != "step"}
        self._log("train", metrics, steps_before + int(line["step"]), iteration.index - 1 + progress)

    def evaluation(self, index: int, metrics: Mapping[str, float], steps: int) -> None:
        """`steps`: optimizer steps so far; iteration -1 is the start."""
        self._log("eval", metrics, steps, index)

    def _log(self, section: str, metrics: Mapping[str, float], step: int, iteration: float) -> None:
        if self.accelerator is not None:
            values = {f"{section}/{TRL_NAMES.get(name, name)}": value for name, value in metrics.items()}
            with writing(Path(self.accelerator.project_configuration.logging_dir or ".")):
                self.accelerator.log(values | {"iteration": iteration}, step=step)


NO_TRACKER = Tracker()


@contextmanager
def tracking(run: RunDir, names: tuple[str, ...], settings: Mapping[str, object]) -> Iterator[Tracker]:
    """The trackers of these names within the block: one run of each per run directory."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise UserError(f"track: {missing[0]} is not installed. Run pip install '{missing[0]}', or remove it.")
    if not names:
        yield NO_TRACKER
        return
    root = run.root
    accelerator = Accelerator(log_with=filter_trackers(list(names), root), project_dir=root)
    accelerator.project_configuration.logging_dir = str(root / "tensorboard")
    hosted = {"name": root.name, "config": dict(settings), "resume": "allow"}
    identity = xxhash.xxh3_64_hexdigest(str(root).encode())  # so that a resumed run continues its own curves
    earlier = mlflow_run(identity) if "mlflow" in names else None
    with writing(root / "tensorboard"):
        accelerator.init_trackers(
            PROJECT,
            init_kwargs={
                "wandb": {**hosted, "id": identity, "dir": str(root)},
                "trackio": hosted,
                "mlflow": {"run_name": root.name, "run_id": earlier, "tags": {MLFLOW_TAG: identity}},
            },
        )
        for tracker in accelerator.trackers:
            if tracker.name == "wandb":
                for part in ("train/*", "eval/*"):
                    tracker.tracker.define_metric(part, step_metric="iteration")
            elif tracker.name == "mlflow" and earlier is None:
                tracker.store_init_configuration(flatten(settings))
    try:
        yield Tracker(accelerator)
    finally:
        trackers = list(accelerator.trackers)
        accelerator.trackers.clear()
        with writing(root / "tensorboard"):
            for tracker in trackers:
                tracker.finish()


def mlflow_run(identity: str) -> str | None:
    """The id of the MLflow run that an earlier start of this run directory created; MLflow generates ids itself."""
    mlflow = import_module("mlflow")
    found = mlflow.search_runs(
        experiment_names=[os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)],
        filter_string=f"tags.`{MLFLOW_TAG}` = '{identity}'",
        max_results=1,
        output_format="list",
    )
    return found[0].info.run_id if found else None


def steps_before(run: RunDir, index: int) -> int:
    """Optimizer steps of the iterations before `index`."""
    return sum(int(str(read_manifest(run.stage(t, "train")).info["steps"])) for t in range(index))
