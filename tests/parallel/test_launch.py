"""Stages on two real ranks, started by torchrun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparring.errors import RunError, UserError
from sparring.loop import play
from sparring.parallel.ray_cluster import order_by_node
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings
from sparring.stages.generate import backend_factory, generate
from sparring.stages.generate.vllm import devices_for_rank
from sparring.stages.launch import run_on_ranks
from sparring.stages.prepare import prepare

pytestmark = pytest.mark.slow

# 48 rows: 576 answers, two parts
SETTINGS = {"samples": 12, "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("nodes", "order", "ranks_per_node"),
    [
        (["a", "b", "a", "b"], [0, 2, 1, 3], 2),
        (["b", "a", "a", "b", "b", "a"], [0, 3, 4, 1, 2, 5], 3),
        (["a", "b", "c"], [0, 1, 2], 1),
        (["a", "a", "b"], [0, 1, 2], 3),  # unequal: as if they were one node
    ],
)
def test_ranks_on_ray_are_numbered_node_by_node(nodes: list[str], order: list[int], ranks_per_node: int) -> None:
    assert order_by_node(nodes) == (order, ranks_per_node)


def make_iteration(recipe: Recipe, folder: Path) -> Iteration:
    run = RunDir(folder)
    run.root.mkdir()
    check_settings(run, recipe)
    prepare(run, recipe)
    return Iteration(run, recipe, 0)


def test_two_processes_draw_the_parts_that_one_would(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("space", generate=SETTINGS, threads=1)
    alone = make_iteration(recipe, tmp_path / "alone")
    generate(alone, backend_factory(alone))
    shared = make_iteration(recipe.model_copy(update={"launch": "torchrun", "num_processes": 2}), tmp_path / "shared")
    monkeypatch.setenv("SPARRING_FAIL_AT", "before-part")
    with pytest.raises(
        RunError,
        match=r"generate of iteration 0 ended early: rank . exited with status 137.* the same command continues",
    ):
        run_on_ranks(shared, "generate")
    monkeypatch.delenv("SPARRING_FAIL_AT")
    run_on_ranks(shared, "generate")
    stage = shared.stage("generate")
    assert not is_committed(stage), "ranks commit parts; this process commits the stage"

    few = make_iteration(make_recipe("spin", threads=1, launch="torchrun", num_processes=2), tmp_path / "few")
    run_on_ranks(few, "generate")  # one part: the rank that has none does not keep the other

    def nothing_left(model: Path) -> None:
        raise AssertionError("everything is drawn already")

    generate(shared, nothing_left)  # type: ignore[arg-type]
    names = [path.name for path in sorted(stage.glob("part-*.parquet"))]
    assert names == ["part-00000.parquet", "part-00001.parquet"]
    assert all((stage / name).read_bytes() == (alone.stage("generate") / name).read_bytes() for name in names)


def test_a_run_that_a_launcher_started_is_refused(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="set launch: torchrun"):
        play(make_recipe("space"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_each_process_s_engine_has_its_own_devices() -> None:
    assert devices_for_rank({}, 1) is None
    assert devices_for_rank({"LOCAL_RANK": "1"}, 1) == "1"
    assert devices_for_rank({"LOCAL_RANK": "1"}, 2) == "2,3"
    assert devices_for_rank({"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 2) == "6,7"
