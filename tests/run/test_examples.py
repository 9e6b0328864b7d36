"""The join of rows, generations and scores: a row that an engine failed on is left out everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from sparring.commands.export import export_pairs
from sparring.data.tables import read_generations, read_table, write_generations
from sparring.errors import RunError
from sparring.loop import play
from sparring.model.load import load_model
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Function, Recipe
from sparring.run.examples import join, load_training_examples
from sparring.run.iteration import Iteration
from sparring.run.manifest import read_manifest
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings
from sparring.stages.generate import generate
from sparring.stages.generate.answers import failed
from sparring.stages.generate.hf import HfBackend
from sparring.stages.prepare import prepare
from sparring.stages.score import score
from sparring.stages.train import train
from sparring.types import Generation, Prompt, Rendered

IDS = np.array([5, 6], dtype=np.int32)


def row(id: str) -> Rendered:
    return Rendered(id, 1, IDS, IDS, "stop", "", "")


def answers(**samples: int) -> list[Generation]:
    return [Generation(id, sample, IDS, "stop") for id, count in samples.items() for sample in range(count)]


def test_rows_that_lack_a_sample_in_any_iteration_are_left_out() -> None:
    rows = [row(id) for id in "abcd"]
    found = join(rows, {0: answers(a=2, b=1, c=2, d=2), 1: answers(d=1, c=1, b=1)})
    assert [one.row.id for one in found] == ["c", "d"], "in the order of the rows"
    assert [[answer.sample for answer in one.generated[0]] for one in found] == [[0, 1], [0, 1]]
    assert [len(one.group(("real", "generated"), [1, 0]).responses["generated"]) for one in found] == [3, 3]


def test_proto_answers_count_too() -> None:
    rows = [row(id) for id in "ab"]
    (only,) = join(rows, {1: answers(a=1, b=1)}, answers(b=1))
    assert only.row.id == "b" and only.proto is not None
    assert set(only.group(("real", "proto"), [1]).responses) == {"real", "proto"}
    assert [one.row.id for one in join(rows, {})] == ["a", "b"], "an iteration of sft reads no generated response"


class FailsOn:
    """The real engine, which fails on one row."""

    def __init__(self, engine: HfBackend, row: str) -> None:
        self.engine, self.row = engine, row

    def generate(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Iterator[Generation]:
        for prompt, answer in zip(prompts, self.engine.generate(prompts, greedy=greedy), strict=True):
            yield failed(prompt, "for a test") if prompt.id == self.row else answer


@pytest.mark.slow
def test_pairs_are_exported_after_an_engine_failed_on_a_row(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """This was a KeyError: training left the row out, and the export did not."""
    rows = {"held_out": 0, "limit": 6, "max_skipped": 0.5}
    recipe = make_recipe("spin", iterations=1, data=rows, generate={"max_new_tokens": 4}, train={"epochs": 1})
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    check_settings(run, recipe)
    prepare(run, recipe)
    iteration = Iteration(run, recipe, 0)
    ids = [row.id for row in iteration.train_rows()]

    @contextmanager
    def open_failing(model: Path) -> Iterator[FailsOn]:
        engine = HfBackend(load_model(model, dtype=torch.float32, device=torch.device("cpu")), end_ids=[3])
        yield FailsOn(engine, ids[2])

    generate(iteration, open_failing)
    score(iteration, SingleProcess())
    assert [one.group.id for one in load_training_examples(iteration)] == ids[:2] + ids[3:]
    train(iteration, SingleProcess())
    assert export_pairs(Results(run.root), tmp_path / "pairs") == 5
    assert read_table(tmp_path / "pairs" / "iteration-00.parquet").num_rows == 5


@pytest.fixture
def generated(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Iteration:
    """An iteration of rft with three written responses per prompt: the real one, the same again, and a wrong one."""
    recipe = make_recipe("rft", generate={"samples": 3}, evaluate={"checker": "number"})
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    prepare(run, recipe)
    iteration = Iteration(run, recipe, 0)
    folder = iteration.stage("generate")
    folder.mkdir(parents=True)
    answers, texts = [], []
    for row in iteration.train_rows():
        wrong = row.real_ids[-2:]
        for sample, (ids, text) in enumerate([(row.real_ids, row.real), (row.real_ids, row.real), (wrong, "#### -1")]):
            answers.append(Generation(row.id, sample, ids, "stop"))
            texts.append(text)
    write_generations(folder / "part-00000.parquet", answers, texts)
    return iteration


def test_accepted_responses_take_the_place_of_real_ones(generated: Iteration) -> None:
    """Once each; what was cut at the limit is no answer, whatever it says."""
    rows = generated.train_rows()
    examples = load_training_examples(generated)
    assert [one.group.id for one in examples] == [row.id for row in rows]
    for one, row in zip(examples, rows, strict=True):
        assert one.opponent == {}
        assert np.array_equal(one.group.responses["real"][0], row.real_ids)
    path = generated.stage("generate") / "part-00000.parquet"
    cut = [replace(answer, finish="length") for answer in read_generations([path])[3:]]
    write_generations(path, [*read_generations([path])[:3], *cut], read_table(path)["text"].to_pylist())
    assert [one.group.id for one in load_training_examples(generated)] == [rows[0].id]


def test_a_function_decides_what_is_accepted(generated: Iteration, tmp_path: Path) -> None:
    """With full marks only: half right is not what rft is to learn."""
    (tmp_path / "checks.py").write_text(
        "def score(prompt, answer, row):\n    return 1 if answer == '#### -1' else 0.5 * (answer == row['answer'])\n"
    )
    checker = Function(function=f"{tmp_path}/checks.py:score")
    evaluate = generated.recipe.evaluate.model_copy(update={"checker": checker})
    judged = replace(generated, recipe=generated.recipe.model_copy(update={"evaluate": evaluate}))
    examples = load_training_examples(judged)
    for one, row in zip(examples, generated.train_rows(), strict=True):
        assert np.array_equal(one.group.responses["real"][0], row.real_ids[-2:])


def test_without_any_accepted_response_training_is_refused(generated: Iteration) -> None:
    path = generated.stage("generate") / "part-00000.parquet"
    answers = read_generations([path])
    write_generations(path, answers, ["#### -1"] * len(answers))
    with pytest.raises(RunError, match=rf"accepts none of the opponent's {len(answers)} responses, so rft has nothing"):
        load_training_examples(generated)


def test_rft_needs_a_checker(make_recipe: Callable[..., Recipe]) -> None:
    with pytest.raises(ValidationError, match="method rft trains on responses that evaluate.checker accepts"):
        make_recipe("rft", evaluate={"checker": None})
    with pytest.raises(ValidationError, match="method rft"):
        make_recipe("spin", evaluate={"checker": None}, per_iteration={1: {"method": "rft"}})


@pytest.mark.slow
def test_rft_plays_on_what_is_accepted(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparring.run.examples.make_check", lambda checker: lambda response, row: len(response) % 2)
    recipe = make_recipe("rft", generate={"samples": 2, "max_new_tokens": 32}, train={"epochs": 1})
    run = play(recipe, tmp_path / "run").run
    for t in range(2):
        iteration = Iteration(run, recipe.at(t), t)
        table = [row for p in iteration.stage("generate").glob("*.parquet") for row in read_table(p).to_pylist()]
        accepted = {(r["id"], tuple(r["token_ids"])) for r in table if r["finish"] == "stop" and len(r["text"]) % 2}
        assert read_manifest(iteration.stage("train")).info["examples"] == len(accepted) > 0
        assert not iteration.stage("score").exists()
