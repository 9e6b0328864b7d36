"""Training on a Ray cluster of three nodes on this machine, for real: one of them is lost in the middle of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from sparring.errors import RankLost
from sparring.loop import play
from sparring.parallel import ray_cluster as on_ray
from sparring.parallel.ray_cluster import RayRanks
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed
from sparring.run.rundir import RunDir
from sparring.stages import launch
from sparring.stages.launch import run_on_ranks

pytestmark = pytest.mark.slow

STEPS = 6  # 48 rows
SETTINGS: dict[str, Any] = {
    "iterations": 1,
    "train": {"epochs": 2, "batch_size": 16, "checkpoint_minutes": 0},
    "threads": 1,
    "num_processes": 2,
    "data": {"held_out": 0, "limit": 48},
}
HANGS = """
import os, sys, time
from pathlib import Path
from sparring.stages import worker
from sparring.stages.train import loop as train
note = Path({note!r})
real = train.failpoint
def hang(name):
    if name == "train-step" and os.environ["RANK"] == "1" and any(note.parent.rglob("step-*/*")) and not note.exists():
        note.touch()
        time.sleep(3600)
    real(name)
train.failpoint = hang
worker.main()
"""
"""A rank that, the first time, hangs in the step after the first checkpoint, and says so in a file."""


def test_a_node_is_lost_and_training_ends_with_the_same_weights(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = play(make_recipe("sft", launch="torchrun", **SETTINGS), tmp_path / "whole").run

    nodes = [ray_cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(3)]
    started: list[RayRanks] = []
    note = tmp_path / "cluster" / "hangs"

    class Hanging(RayRanks):
        def __init__(self, ray: Any, count: int | None, threads: int | None, words: Sequence[str], ended: Path) -> None:
            super().__init__(ray, count, threads, ["-c", HANGS.format(note=str(note)), *words[2:]], ended)
            started.append(self)

    monkeypatch.setattr(on_ray, "RayRanks", Hanging)
    recipe = make_recipe("sft", launch="ray", ray_address=ray_cluster.address, **SETTINGS)
    run = RunDir(tmp_path / "cluster" / "run")
    playing = threading.Thread(target=play, args=(recipe, run.root), daemon=True)
    playing.start()  # elsewhere, since nodes are ended from the main thread
    while not note.exists() and playing.is_alive():
        time.sleep(0.05)
    assert playing.is_alive() and not is_committed(run.stage(0, "train"))
    (doomed,) = [node for node in nodes if node.node_id == started[0].nodes[1]]
    ray_cluster.remove_node(doomed, allow_graceful=False)
    playing.join(timeout=240)
    assert not playing.is_alive()

    assert "restarts from what is committed" in capsys.readouterr().err
    assert len(started) == 2
    assert doomed.node_id not in started[1].nodes and len(set(started[1].nodes)) == 2
    lines = [json.loads(line) for line in (run.stage(0, "train") / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    ours, theirs = (r.model(0) / "model.safetensors" for r in (run, whole))
    assert ours.read_bytes() == theirs.read_bytes()


def test_ranks_that_die_again_and_again_end_the_stage(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Any
) -> None:
    while len(ray_cluster.worker_nodes) < 2:
        ray_cluster.add_node(num_cpus=1, object_store_memory=10**8)
    monkeypatch.setattr(launch, "MAX_LOSSES", 2)
    run = play(make_recipe("sft", **SETTINGS | {"num_processes": "auto"}), tmp_path / "run").run
    run.stage(0, "train").rename(tmp_path / "aside")

    class Dying(RayRanks):
        def __init__(self, ray: Any, count: int | None, threads: int | None, words: Sequence[str], ended: Path) -> None:
            super().__init__(ray, count, threads, ["-c", "import os; os._exit(9)"], ended)

    monkeypatch.setattr(on_ray, "RayRanks", Dying)
    recipe = make_recipe("sft", launch="ray", ray_address=ray_cluster.address, **SETTINGS)
    with pytest.raises(RankLost, match="exited with status 9"):
        run_on_ranks(Iteration(run, recipe, 0), "train")
