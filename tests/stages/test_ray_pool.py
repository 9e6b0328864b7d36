"""A Ray cluster of three nodes on this machine, for real: one of them is lost in the middle of generate."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from shortcuts import generations

ray = pytest.importorskip("ray")
from sparring.errors import RunError, UserError
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings
from sparring.stages.generate import backend_factory, generate, plan_parts, prepare_parts
from sparring.stages.generate import ray_pool as on_ray
from sparring.stages.generate.ray_pool import generate_on_ray
from sparring.stages.prepare import prepare
from sparring.types import Backend, Generation, OpenBackend, Prompt

pytestmark = pytest.mark.slow

# 48 rows: 3,840 answers, eight parts
SETTINGS = {"samples": 80, "max_new_tokens": 2}


class Stuck:
    """An engine that hangs on one node, and says so in a file; on the others it waits for that and then works."""

    def __init__(self, backend: Backend, doomed: str, note: Path) -> None:
        self.backend = backend
        self.is_doomed = ray.get_runtime_context().get_node_id() == doomed
        self.note = note

    def generate(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Iterator[Generation]:
        for place, answer in enumerate(self.backend.generate(prompts, greedy=greedy)):
            if self.is_doomed and place == 100:
                self.note.touch()
            while (self.is_doomed and place == 100) or (not self.note.exists() and not self.is_doomed):
                time.sleep(0.05)
            yield answer


@contextmanager
def open_stuck(model: Path, opener: OpenBackend, doomed: str, note: Path) -> Iterator[Backend]:
    with opener(model) as backend:
        yield Stuck(backend, doomed, note)


@contextmanager
def open_deadly(model: Path) -> Iterator[Backend]:
    class Deadly:
        def generate(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Iterator[Generation]:
            import os

            os._exit(1)

    yield Deadly()  # type: ignore[misc]


@contextmanager
def open_refused(model: Path) -> Iterator[Backend]:
    raise UserError("generate.backend: it is not installed on this node")
    yield


@pytest.fixture(autouse=True, scope="module")
def engines_travel_by_value() -> None:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


def make_iteration(recipe: Recipe, folder: Path) -> Iteration:
    run = RunDir(folder)
    run.root.mkdir()
    check_settings(run, recipe)
    prepare(run, recipe)
    return Iteration(run, recipe, 0)


def test_a_node_is_lost_another_joins_and_every_row_is_answered_once(
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ray_cluster: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = make_recipe("space", iterations=1, generate=SETTINGS, threads=1)
    alone = make_iteration(recipe, tmp_path / "alone")
    generate(alone, backend_factory(alone))

    doomed, _ = (ray_cluster.add_node(num_cpus=1, object_store_memory=10**8) for _ in range(2))
    note = tmp_path / "stuck"
    opener = partial(open_stuck, opener=backend_factory(alone), doomed=doomed.node_id, note=note)
    monkeypatch.setattr(on_ray, "backend_factory", lambda _: opener)

    on_cluster = recipe.model_copy(update={"launch": "ray", "ray_address": ray_cluster.address})
    shared = make_iteration(on_cluster, tmp_path / "run")
    playing = threading.Thread(target=generate_on_ray, args=(shared,), daemon=True)
    playing.start()  # elsewhere, since nodes are started from the main thread
    run = shared.run
    parts = run.work(run.stage(0, "generate"))
    while not (note.exists() and any(parts.glob("part-*.parquet"))) and playing.is_alive():
        time.sleep(0.05)
    ray_cluster.add_node(num_cpus=1, object_store_memory=10**8)
    ray_cluster.remove_node(doomed, allow_graceful=False)
    playing.join(timeout=180)
    assert not playing.is_alive()

    assert "an engine died" in capsys.readouterr().err

    def nothing_left(model: Path) -> None:
        raise AssertionError("everything is drawn already")

    generate(shared, nothing_left)  # type: ignore[arg-type]
    answers = generations(shared, 0)
    assert sorted(answers) == sorted(row.id for row in shared.train_rows())
    assert all([a.sample for a in drawn] == list(range(80)) for drawn in answers.values())
    names = sorted(path.name for path in alone.stage("generate").glob("part-*.parquet"))
    assert len(names) == 8
    assert all((shared.stage("generate") / n).read_bytes() == (alone.stage("generate") / n).read_bytes() for n in names)


def test_what_an_engine_refuses_or_dies_of_ends_the_stage(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: Any
) -> None:
    monkeypatch.setattr(on_ray, "MAX_DEATHS", 2)
    recipe = make_recipe("space", generate=SETTINGS, threads=1, launch="ray", ray_address=ray_cluster.address)
    iteration = make_iteration(recipe, tmp_path / "run")
    monkeypatch.setattr(on_ray, "backend_factory", lambda _: open_refused)
    with pytest.raises(UserError, match="not installed on this node"):
        generate_on_ray(iteration)
    monkeypatch.setattr(on_ray, "backend_factory", lambda _: open_deadly)
    with pytest.raises(RunError, match="2 engines died at part-0000"):
        generate_on_ray(iteration)
    prepare_parts(iteration)
    assert not any(path.exists() for path in plan_parts(iteration))


def test_a_cluster_that_is_not_there_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("space", launch="ray", ray_address="127.0.0.1:1")
    with pytest.raises(UserError, match="no Ray cluster answers at 127.0.0.1:1:"):
        generate_on_ray(make_iteration(recipe, tmp_path / "run"))


def test_an_invalid_address_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    iteration = make_iteration(make_recipe("space"), tmp_path / "run")
    for address in ("head-node", "ray://head:10001"):
        recipe = iteration.recipe.model_copy(update={"launch": "ray", "ray_address": address})
        with pytest.raises(UserError, match="Write HOST:PORT"):
            generate_on_ray(replace(iteration, recipe=recipe))


def test_an_address_without_ray_is_a_mistake(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValueError, match="ray_address is a setting of launch: ray"):
        make_recipe("space", ray_address="auto")
