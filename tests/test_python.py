"""sparring from Python: rows in memory, what `play` returns, callbacks, and what is raised."""

from __future__ import annotations

import difflib
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import sparring
from sparring.errors import CorruptedError
from sparring.model.load import load_tokenizer
from sparring.recipe.load import dump_recipe, load_recipe
from sparring.recipe.schema import Recipe
from sparring.run.in_memory import as_json, keep_rows, model_folder, tokenizer_settings
from sparring.run.manifest import is_committed
from sparring.run.mirror import Mirror
from sparring.run.results import Results, StageState
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
    keep_rows(run, {"train": rows[:5]})  # the held-out rows by their path
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


def test_a_mirror_keeps_the_rows(results: Results, tmp_path: Path) -> None:
    mirror, elsewhere = Mirror(f"file://{tmp_path / 'mirror'}"), RunDir(tmp_path / "elsewhere")
    mirror.send_all(results.run)
    mirror.fetch(elsewhere)
    assert (elsewhere.rows / "train.jsonl").read_bytes() == (results.run.rows / "train.jsonl").read_bytes()
    elsewhere.check_lineage(elsewhere.data)


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


def test_what_play_returns(results: Results) -> None:
    assert repr(results) == f"space: 1 of 1 iterations trained; report: {results.run.report}"
    frame = results.to_pandas()
    assert list(frame.index) == [-1, 0]
    evaluations = results.evaluations()
    assert frame["held_out_nll"].to_dict() == {i: metrics["held_out_nll"] for i, metrics in evaluations.items()}
    assert results.best() == 0 and results.best_model() == results.run.model(0)
    axes = results.plot()
    line = axes.containers[0].lines[0]
    assert list(line.get_ydata()) == [evaluations[i]["held_out_nll"] for i in (-1, 0)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["start", "0"]
    assert results.plot("sampled_accuracy", axes) is axes, "a second curve in the same axes"
    with pytest.raises(sparring.UserError, match="plot: bleu has not been evaluated. Choose one of .*held_out_nll"):
        results.plot("bleu")


def test_without_pandas(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(sparring.UserError, match="pip install pandas"):
        results.to_pandas()


def test_callbacks(results: Results, tmp_path: Path) -> None:
    """In order, after each commit, in this process; an exception ends the run, and the same call continues it."""
    root, recipe, pid = shutil.copytree(results.run.root, tmp_path / "run"), results.recipe, os.getpid()
    for stage in ("score", "train", "evaluate"):
        shutil.rmtree(root / "iter-00" / stage)
    heard: list[object] = []

    def stage_ended(now: Results, stage: StageState) -> None:
        assert stage.state == "done" and is_committed(now.run.stage(stage.iteration, stage.stage))
        assert os.getpid() == pid and ("held_out_nll" in stage.metrics) == (stage.stage == "evaluate")
        heard.append((stage.iteration, stage.stage))
        if stage.stage == "train":
            raise KeyError("enough")

    def iteration_ended(now: Results, index: int) -> None:
        assert now.evaluation(index) is not None
        heard.append(index)

    with pytest.raises(KeyError, match="enough"):
        sparring.play(recipe, root, on_stage_end=stage_ended, on_iteration_end=iteration_ended)
    assert heard == [(0, "score"), (0, "train")] and RunDir(root).owner() is None
    sparring.play(recipe, root, on_stage_end=stage_ended, on_iteration_end=iteration_ended)
    assert heard[2:] == [(0, "evaluate"), 0], "what was heard before is not heard again"
    sparring.play(recipe, root, on_stage_end=stage_ended, on_iteration_end=iteration_ended)
    assert len(heard) == 4
    run = RunDir(root)
    assert run.digest(run.model(0)) == results.run.digest(results.run.model(0))


def test_an_os_error_of_a_callback_is_the_cause(results: Results, tmp_path: Path) -> None:
    root = shutil.copytree(results.run.root, tmp_path / "run")
    shutil.rmtree(root / "iter-00" / "evaluate")

    def fail(now: Results, index: int) -> None:
        raise ConnectionError("the tracker is away")

    with pytest.raises(sparring.RunError, match="the tracker is away. Everything committed is intact") as raised:
        sparring.play(results.recipe, root, on_iteration_end=fail)
    assert isinstance(raised.value.__cause__, ConnectionError)


def test_runs_are_compared(results: Results, rows: Rows, call: dict[str, Any], tmp_path: Path) -> None:
    sft = sparring.play(train=rows, run_dir=tmp_path / "sft", **call | {"method": "sft"})
    comparison = sparring.compare(sft.run.root, results)
    frame = comparison.to_pandas()
    assert list(zip(frame["method"], frame["iteration"], strict=True)) == [
        (method, index) for method in ("sft", "space") for index in (-1, 0)
    ]
    nll = frame.set_index(["method", "iteration"])["held_out_nll"]
    assert nll["space", 0] == results.evaluations()[0]["held_out_nll"] != nll["sft", 0]
    assert nll["space", -1] == nll["sft", -1]
    assert list(frame["is_chosen"]) == [False, True] * 2
    assert [line.get_label() for line in comparison.plot().containers] == ["sft", "space"]
    twice = sparring.compare(results, shutil.copytree(results.run.root, tmp_path / "copy"))
    assert twice.labels == ["run", "copy"], "one method and seed: called by their folders"


def test_runs_that_cannot_be_compared(results: Results, tmp_path: Path) -> None:
    with pytest.raises(sparring.UserError, match="pass two or more"):
        sparring.compare(results)
    seeded, other = Results(results.run.root), Results(results.run.root)
    seeded.recipe = results.recipe.model_copy(update={"seed": 1})
    other.recipe = results.recipe.model_copy(update={"method": sparring.OBJECTIVES["sft"]()})
    with pytest.raises(sparring.UserError, match=r"the seeds of sft are \[0\], those of space \[0, 1\]"):
        sparring.compare(results, seeded, other)
    root = shutil.copytree(results.run.root, tmp_path / "unfinished")
    shutil.rmtree(root / "iter-00" / "evaluate")
    with pytest.raises(sparring.UserError, match="unfinished has 1 of 2 evaluations, the start's included"):
        sparring.compare(results, root)


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny / "model")


def test_a_loaded_tokenizer_is_its_template_and_its_end_token(
    tokenizer: PreTrainedTokenizerBase, tiny: Path, make_recipe: Callable[..., Recipe]
) -> None:
    data = make_recipe().data
    assert tokenizer_settings(tokenizer, tiny / "model", data) == {}
    other = load_tokenizer(tiny / "model")
    other.chat_template, other.eos_token = "{% for m in messages %}{{ m.content }}{% endfor %}", other.pad_token
    changed = {"data.template": other.chat_template, "data.end_token": other.pad_token}
    assert tokenizer_settings(other, tiny / "model", data) == changed
    named = data.model_copy(update={"template": "{prompt}"})
    assert list(tokenizer_settings(other, tiny / "model", named)) == ["data.end_token"], "the recipe's own comes first"
    other.add_tokens(["<new>"])
    with pytest.raises(sparring.UserError, match="tokenizer: its tokens differ from those of the tokenizer in"):
        tokenizer_settings(other, tiny / "model", data)


def test_a_loaded_model_is_refused(tiny: Path) -> None:
    assert model_folder(tiny) == str(tiny) and model_folder("org/name") == "org/name" and model_folder(None) is None
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    with pytest.raises(sparring.UserError, match="model: pass the folder or Hub id of the LlamaForCausalLM"):
        model_folder(model)


SCRIPT = """
from datasets import load_dataset
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained("MODEL")
rows = load_dataset("json", data_files="ROWS", split="train")
args = SFTConfig(
    output_dir="run", learning_rate=1e-3, per_device_train_batch_size=8, gradient_accumulation_steps=2, max_length=64
)
trainer = SFTTrainer("MODEL", args=args, train_dataset=rows, processing_class=tokenizer)
trainer.train()
trainer.save_model("out")
"""


def test_a_script_for_trl_changes_three_lines(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    chats = [{"prompt": row["question"], "completion": row["answer"]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    before = SCRIPT.replace("MODEL", str(tiny / "model")).replace("ROWS", str(tmp_path / "rows.jsonl"))
    after = before
    for old, new in (
        ("from trl import SFTConfig, SFTTrainer", "from sparring import SelfPlayConfig, SelfPlayTrainer"),
        ("SFTConfig(\n", 'SelfPlayConfig(recipe={"iterations": 1, "generate.max_new_tokens": 16},\n'),
        ("SFTTrainer(", "SelfPlayTrainer("),
    ):
        assert after.count(old) == 1
        after = after.replace(old, new)
    changed = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line.startswith("+ ")]
    assert len(changed) == 3
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    exec(after, {})
    played = Results(tmp_path / "run")
    recipe = played.recipe
    assert (recipe.train.batch_size, recipe.train.learning_rate, recipe.train.max_length) == (16, 1e-3, 64)
    assert recipe.method.name == "space" and played.evaluation(recipe.iterations - 1) is not None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() > 0
    if find_spec("trl") is not None:
        from trl import SFTConfig, SFTTrainer

        ours = {field.name for field in fields(sparring.SelfPlayConfig)} - {"method", "recipe"}
        assert ours <= {field.name for field in fields(SFTConfig)}
        parameters = set(inspect.signature(sparring.SelfPlayTrainer).parameters)
        assert parameters <= set(inspect.signature(SFTTrainer.__init__).parameters)


def test_a_setting_that_the_trainer_lacks_is_an_error(rows: Rows, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="packing"):
        sparring.SelfPlayConfig(output_dir=tmp_path, packing=True)  # type: ignore[call-arg]
    args = sparring.SelfPlayConfig(output_dir=tmp_path / "run", lr_scheduler_type="polynomial")
    with pytest.raises(sparring.UserError, match="train.schedule: .*polynomial"):
        sparring.SelfPlayTrainer(tiny / "model", args, rows).train()
