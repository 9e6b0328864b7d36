"""Numbers on their way to a tracker: TRL's names for them, and one axis of optimizer steps over all iterations.

metrics.jsonl and metrics.json stay the record; a tracker is a second reader, and what it loses is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

from sparring.parallel import distributed
from sparring.run.manifest import read_manifest
from sparring.run.rundir import RunDir

TRL_NAMES = {
    "rewards/real": "rewards/chosen",
    "rewards/generated": "rewards/rejected",
    "logps/real": "logps/chosen",
    "logps/generated": "logps/rejected",
    "gradient_norm": "grad_norm",
}
"""What TRL's DPOTrainer calls the same numbers. All other names are ours."""


def tracking(run: RunDir, names: tuple[str, ...], settings: Mapping[str, object]) -> AbstractContextManager[None]:
    """One run of each tracker per run directory; a run that is continued goes on in it."""
    return distributed.tracking(names, run.root, settings)


def steps_before(run: RunDir, index: int) -> int:
    """Optimizer steps of the iterations before `index`."""
    return sum(int(str(read_manifest(run.stage(t, "train")).info["steps"])) for t in range(index))


def track_step(metrics: Mapping[str, float], step: int, iteration: float) -> None:
    """`iteration`: goes from t - 1 to t while iteration t is trained, so that its evaluation stands at the end."""
    values = {TRL_NAMES.get(name, name): value for name, value in metrics.items() if name != "step"}
    distributed.log({f"train/{name}": value for name, value in values.items()} | {"iteration": iteration}, step)


def track_evaluation(metrics: Mapping[str, float], step: int, iteration: int) -> None:
    """`step`: of training so far; iteration -1 is the start."""
    values = {TRL_NAMES.get(name, name): value for name, value in metrics.items()}
    distributed.log({f"eval/{name}": value for name, value in values.items()} | {"iteration": iteration}, step)
