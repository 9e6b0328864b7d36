"""play(): one command from rows to report; the same command again; what it refuses."""

from __future__ import annotations

import gc
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import sparring
from sparring.errors import RunMismatch, UserError
from sparring.loop import play, run_one_stage
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.stages import launch

MakeRecipe = Callable[..., Recipe]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def stamps(folder: Path) -> dict[str, int]:
    """When each artifact was written; the notes of the session are written by every start."""
    notes = {"recipe.yaml", "env.json", ".lock"}
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name not in notes}


@pytest.mark.parametrize(
    "method", [*(pytest.param(m, marks=pytest.mark.slow) for m in ("sft", "spin", "tspin")), "space"]
)
def test_one_command_plays_everything(played: Callable[[str], Any], method: str) -> None:
    recipe, run = played(method)
    for index in range(-1, 3):
        iteration = Iteration(run, recipe.at(index), index)
        assert all(is_committed(iteration.stage(stage)) for stage in iteration.stages)
    assert not list(run.root.rglob(".*.partial")) and not list(run.root.rglob("*.tmp-*"))
    model = AutoModelForCausalLM.from_pretrained(run.model(2))
    tokenizer = AutoTokenizer.from_pretrained(run.model(2))
    assert model.dtype == torch.float32 and tokenizer.chat_template
    assert run.report.read_text().startswith("<!doctype html>")
    results = Results(run.root)
    assert [s.state for s in results.stages()] == ["done"] * len(results.stages())
    assert len(results.evaluations()) == 4
    written = stamps(run.root)
    play(recipe, run.root)
    assert stamps(run.root) == written, "the same command again does nothing"


@pytest.mark.slow
def test_every_stage_gives_its_memory_back(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM, in a process of its own, wants nine tenths of the device that the stage before used."""

    def models() -> int:
        return sum(isinstance(thing, PreTrainedModel) for thing in gc.get_objects())

    counts: list[int] = []

    def release() -> None:
        gc.collect()
        counts.append(models())

    gc.collect()
    before = models()
    monkeypatch.setattr(launch, "release_memory", release)
    run = play(make_recipe("spin", iterations=1, train={"epochs": 1}), tmp_path / "run").run
    assert len(counts) == len(Results(run.root).stages())
    assert set(counts) == {before}, "no model is held when the device's cache is emptied"


def test_the_package_offers_play_and_its_pieces(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(make_recipe("space")))
    run = sparring.play(file, tmp_path / "run", ["iterations=1", "train.epochs=1"]).run
    assert is_committed(run.stage(0, "evaluate")) and not run.iteration(1).exists()
    assert sparring.OBJECTIVES["space"]().mu == 1.0
    assert set(sparring.__all__) <= set(dir(sparring)) | set(sparring._HOMES)
    with pytest.raises(AttributeError):
        _ = sparring.nothing_of_this_name


@pytest.mark.slow
def test_two_runs_are_equal_byte_by_byte(make_recipe: MakeRecipe, played: Callable[[str], Any], tmp_path: Path) -> None:
    first, second = played("spin").run, play(make_recipe("spin", train={"epochs": 1}), tmp_path / "two").run
    for t in range(2):
        assert bytes_of(first.model(t)) == bytes_of(second.model(t))
        for stage in ("generate", "score", "evaluate"):
            assert first.digest(first.stage(t, stage)) == second.digest(second.stage(t, stage))
    other = play(make_recipe("spin", iterations=1, train={"epochs": 1}, seed=1), tmp_path / "three").run
    assert bytes_of(first.model(0)) != bytes_of(other.model(0)), "a control that must differ"


@pytest.mark.slow
def test_more_iterations_continue_a_run(make_recipe: MakeRecipe, played: Callable[[str], Any], tmp_path: Path) -> None:
    play(make_recipe("space", iterations=1, train={"epochs": 1}), tmp_path / "run")
    longer = play(make_recipe("space", iterations=2, train={"epochs": 1}), tmp_path / "run").run
    assert bytes_of(longer.model(1)) == bytes_of(played("space").run.model(1))


def test_other_settings_are_refused_with_a_diff(make_recipe: MakeRecipe, played: Callable[[str], Any]) -> None:
    root = played("space").run.root
    before = bytes_of(root)
    with pytest.raises(RunMismatch) as caught:
        play(make_recipe("space", iterations=1, train={"epochs": 2, "learning_rate": 1e-4}), root)
    assert "train.epochs is 2, but the run was started with 1" in str(caught.value)
    assert "train.learning_rate is 0.0001, but the run was started with 0.001" in str(caught.value)
    assert bytes_of(root) == before, "nothing was touched"


@pytest.mark.slow
def test_changed_rows_are_refused(make_recipe: MakeRecipe, tiny: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    shutil.copy(tiny / "rows.jsonl", rows)
    recipe = make_recipe("space", iterations=1, data={"train": str(rows)}, train={"epochs": 1})
    play(recipe, tmp_path / "run")
    rows.write_text(rows.read_text().replace("eggs", "pens"))
    with pytest.raises(RunMismatch, match=r"rows\.jsonl has changed since"):
        play(recipe, tmp_path / "run")


def test_a_deleted_stage_is_made_again_the_same(played: Callable[[str], Any], tmp_path: Path) -> None:
    recipe, original = played("spin")
    run = RunDir(shutil.copytree(original.root, tmp_path / "run"))
    for stage in ("generate", "score", "train"):
        shutil.rmtree(run.stage(1, stage))
    run = play(recipe, run.root).run
    assert bytes_of(run.model(1)) == bytes_of(original.model(1))


def test_stages_by_hand(played: Callable[[str], Any], tmp_path: Path) -> None:
    recipe, original = played("space")
    recipe = recipe.model_copy(update={"iterations": 2})
    run = RunDir(shutil.copytree(original.root, tmp_path / "run"))
    expected = bytes_of(run.model(1))
    shutil.rmtree(run.iteration(2))
    shutil.rmtree(run.iteration(1))
    with pytest.raises(UserError, match="'generate' of iteration 1 must be done first"):
        run_one_stage(recipe, run.root, "train", 1)
    for stage in ("generate", "score", "train", "evaluate"):
        assert run_one_stage(recipe, run.root, stage, 1)
    assert not run_one_stage(recipe, run.root, "evaluate", 1), "done already"
    assert bytes_of(run.model(1)) == expected
    with pytest.raises(UserError, match="iterations 0 to 1"):
        run_one_stage(recipe, run.root, "train", 2)
    with pytest.raises(UserError, match="space has no such stage"):
        run_one_stage(recipe, run.root, "polish", 1)
    with pytest.raises(UserError, match="is not a run yet"):
        run_one_stage(recipe, tmp_path / "nowhere", "train", 0)


@pytest.mark.slow
def test_tspin_has_no_score_stage(played: Callable[[str], Any]) -> None:
    recipe, run = played("tspin")
    with pytest.raises(UserError, match="tspin has no such stage"):
        run_one_stage(recipe, run.root, "score", 0)


@pytest.mark.slow
def test_one_owner(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("space", iterations=1, train={"epochs": 1})
    found: list[str] = []

    def contend() -> None:
        try:
            play(recipe, tmp_path / "run")
        except UserError as refusal:
            found.append(str(refusal))

    threads = [threading.Thread(target=contend) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all(f"in use by process {os.getpid()}" in message for message in found)
    assert is_committed(tmp_path / "run" / "iter-00" / "evaluate")


@pytest.mark.slow
def test_paths_with_spaces_and_another_working_directory(
    make_recipe: MakeRecipe, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "a folder with spaces and ünïcode"
    shutil.copytree(tiny, home)
    monkeypatch.chdir(home)
    recipe = make_recipe("space", iterations=1, model="model", data={"train": "rows.jsonl"}, train={"epochs": 1})
    run = play(recipe, "runs/my run").run
    assert run.report.is_file()
    written = stamps(run.root)
    play(recipe, "runs/my run")
    assert stamps(run.root) == written


def test_sessions_are_recorded(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("sft", iterations=1, train={"epochs": 1})
    run = play(recipe, tmp_path / "run").run
    play(recipe, tmp_path / "run")
    sessions = json.loads(run.env.read_text())["sessions"]
    assert len(sessions) == 2
    assert sessions[0]["versions"]["torch"] == torch.__version__
    assert {"device", "threads", "host", "started"} <= set(sessions[0])


@pytest.mark.slow
def test_the_best_iteration_is_named_by_the_chosen_metric(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("sft", iterations=2, train={"epochs": 2, "learning_rate": 1e-2})
    run = play(recipe, tmp_path / "run").run
    results = Results(run.root)
    choosing, judging = results.halves
    values = {i: results.value("held_out_nll", i, choosing).mean for i in results.evaluations()}
    best = results.best()
    assert best is not None and values[best] == min(values.values())
    assert best >= 0, "training on the rows helps"
    headline = results.headline()
    assert headline is not None and (headline.iteration, headline.choosing_prompts) == (best, 6)
    assert headline.value["held_out_nll"] == results.value("held_out_nll", best, judging), "others judge it"
