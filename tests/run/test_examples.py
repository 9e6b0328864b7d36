"""The join of rows, generations and scores: a row that an engine failed on is left out everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from sparring.commands.export import export_pairs
from sparring.data.tables import read_table
from sparring.model.load import load_model
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.examples import join, load_training_examples
from sparring.run.iteration import Iteration
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
