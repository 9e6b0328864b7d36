"""sparring from Python: rows in memory, what `play` returns, callbacks, and what is raised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

import sparring
from sparring.errors import CorruptedError
from sparring.recipe.load import dump_recipe, load_recipe
from sparring.recipe.schema import Recipe
from sparring.run.results import Results
from sparring.run.rows import as_json, keep_rows
from sparring.run.rundir import RunDir

Rows = list[dict[str, object]]

SETTINGS = {
    "iterations": 1,
    "generate.max_new_tokens": 16,
    "train": {"learning_rate": 1e-3, "epochs": 1, "batch_size": 16, "micro_batch_tokens": 256, "dtype": "float32"},
    "evaluate.checker": "number",
}


@pytest.fixture(scope="module")
def rows(tiny: Path) -> Rows:
    return [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def call(tiny: Path) -> dict[str, Any]:
    """The keywords of a run that plays in seconds."""
    return {"model": tiny / "model", "method": "space", "held_out": 12, "overrides": SETTINGS}


@pytest.fixture(scope="module")
def results(rows: Rows, call: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Results:
    return sparring.play(train=rows, run_dir=tmp_path_factory.mktemp("python") / "run", **call)


def written(run: RunDir) -> dict[str, int]:
    notes = {"recipe.yaml", "env.json", ".lock"}
    return {str(p): p.stat().st_mtime_ns for p in run.root.rglob("*") if p.is_file() and p.name not in notes}


def test_rows_in_memory_play_like_the_same_rows_in_a_file(
    results: Results, tiny: Path, call: dict[str, Any], tmp_path: Path
) -> None:
    from_file = sparring.play(train=tiny / "rows.jsonl", run_dir=tmp_path / "file", **call)
    for stage in ("generate", "score", "train/model", "evaluate"):
        first, second = results.run.stage(0, stage), from_file.run.stage(0, stage)
        assert results.run.digest(first) == from_file.run.digest(second), stage


def test_the_same_call_continues_and_the_command_line_too(results: Results, rows: Rows, call: dict[str, Any]) -> None:
    before = written(results.run)
    sparring.play(train=Dataset.from_list(rows), run_dir=results.run.root, **call)  # the same rows, held otherwise
    sparring.play(results.run.recipe, results.run.root)  # as `sparring run RUN_DIR/recipe.yaml RUN_DIR`
    assert written(results.run) == before


def test_other_rows_are_refused(results: Results, rows: Rows, call: dict[str, Any]) -> None:
    before = written(results.run)
    with pytest.raises(sparring.RunMismatch, match=r"^train: the rows differ from those in .*rows, from which"):
        sparring.play(train=rows[:-1], run_dir=results.run.root, **call)
    with pytest.raises(sparring.RunMismatch, match="data.held_out is .*held_out.jsonl"):
        sparring.play(train=rows, run_dir=results.run.root, **call | {"held_out": rows[:9]})
    assert written(results.run) == before


def test_a_row_is_named_by_its_line_and_the_next_call_may_have_others(
    rows: Rows, call: dict[str, Any], tmp_path: Path
) -> None:
    bad: list[Any] = [rows[0], {"question": "3+3=", "answer": ""}, "no row"]
    with pytest.raises(
        sparring.UserError, match=r"2 of 3 rows of .*rows/train\.jsonl cannot be used: row 2 of"
    ) as raised:
        sparring.play(train=bad, run_dir=tmp_path / "run", **call)
    named = str(raised.value).partition("rows of ")[2].partition(" cannot")[0]
    assert json.loads(Path(named).read_text().splitlines()[1]) == bad[1], "the file is there to look at"
    keep_rows(RunDir(tmp_path / "run"), {"train": rows})
    assert len(Path(named).read_text().splitlines()) == len(rows)


def test_a_start_that_was_killed_before_the_data_stage_leaves_nothing_in_the_way(rows: Rows, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    keep_rows(run, {"train": rows})
    keep_rows(run, {"train": rows[:5], "held_out": rows[5:7]})
    assert [len((run.rows / f"{n}.jsonl").read_bytes().splitlines()) for n in ("train", "held_out")] == [5, 2]


def test_corrupted_rows_are_written_again_from_memory(rows: Rows, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    keep_rows(run, {"train": rows})
    file = run.rows / "train.jsonl"
    text = file.read_text()
    file.write_text(text.replace("answer", "ansver", 1))
    with pytest.raises(CorruptedError):
        RunDir(run.root).digest(file)
    run = RunDir(run.root)
    keep_rows(run, {"train": rows})
    assert file.read_text() == text and (run.root / "rows.damaged-1").is_dir()


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (DatasetDict(train=Dataset.from_list([{"a": 1}])), "train: rows are a list, not a DatasetDict of 'train'"),
        (iter([{"question": "1", "answer": "2"}]), "train: a list_iterator is neither a path nor rows"),
        ([], "rows/train.jsonl has no usable row: it is empty"),
        (None, "recipe: 'data' is missing"),
        ("rows.jsonl", "data: .*rows.jsonl does not exist"),
    ],
)
def test_what_is_not_rows_is_refused(train: Any, message: str, call: dict[str, Any], tmp_path: Path) -> None:
    if train is None:
        call = call | {"held_out": None}
    with pytest.raises(sparring.UserError, match=message):
        sparring.play(train=train, run_dir=tmp_path / "run", **call)


def test_rows_that_contain_themselves_are_refused(tmp_path: Path) -> None:
    row: dict[str, object] = {"question": "1"}
    row["answer"] = [row]
    with pytest.raises(sparring.UserError, match="train: row 2 is nested too deeply, or contains itself"):
        keep_rows(RunDir(tmp_path / "run"), {"train": [{"question": "1"}, row]})


def test_values_that_json_lacks() -> None:
    turns = np.array([{"role": "user", "content": "Hi"}], dtype=object)  # as pandas reads a column of lists
    row = {"messages": turns, "score": float("nan"), "n": np.int64(3), "seen": True, "kind": ("a", None), 1: Path("x")}
    assert as_json(row) == {
        "messages": [{"role": "user", "content": "Hi"}],
        "score": None,
        "n": 3,
        "seen": True,
        "kind": ["a", None],
        "1": "x",
    }


def test_a_dataset_loses_the_nulls_that_arrow_adds(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi", "name": "Ada"}, {"role": "assistant", "content": "Hello"}]
    keep_rows(RunDir(tmp_path / "run"), {"train": Dataset.from_list([{"messages": turns}])})
    assert json.loads((tmp_path / "run" / "rows" / "train.jsonl").read_text())["messages"] == turns


def test_keywords_replace_settings_of_a_recipe(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("spin")
    overrides = {"method": {"name": "space", "mu": 2}, "train.epochs": 3}
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    for source in (recipe, file):
        changed = load_recipe(source, overrides)
        assert (changed.method, changed.train.epochs) == (sparring.OBJECTIVES["space"](mu=2), 3)
        assert changed.train.learning_rate == recipe.train.learning_rate
    auto = Recipe.model_validate({"model": "m", "method": "sft", "data": {"train": "rows.jsonl"}})
    assert load_recipe(auto, {"iterations": 2}).train.has_auto_dtype, "a dtype that nobody named stays automatic"
    with pytest.raises(sparring.UserError, match=r"recipe: there is no setting 'train.lr'"):
        load_recipe(None, {"model": "m", "method": "sft", "data.train": "rows.jsonl", "train.lr": 1})
    with pytest.raises(sparring.UserError, match="run_dir is missing"):
        sparring.play(recipe)
