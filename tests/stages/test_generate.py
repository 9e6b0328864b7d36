"""What is particular to the Hugging Face engine, and the generate stage. The contract is in test_engines.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from shortcuts import generations

from sparring.data.tables import read_rendered, write_rows
from sparring.errors import RunError
from sparring.model.load import load_model, load_tokenizer
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.examples import load_training_examples
from sparring.run.iteration import Iteration, seed_of
from sparring.run.manifest import commit, read_manifest
from sparring.run.rundir import RunDir
from sparring.stages.generate import generate, open_backend
from sparring.stages.generate.answers import failed, finish_generation
from sparring.stages.generate.hf import HfBackend, choose
from sparring.stages.prepare import prepare
from sparring.stages.score import score
from sparring.stages.train.loop import train
from sparring.types import Generation, Prompt

CPU = torch.device("cpu")
END = 3


@pytest.fixture
def backend(tiny: Path) -> HfBackend:
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    return HfBackend(model, end_ids=[END], batch_size=4)


def prompts(tiny: Path, count: int = 10, max_new_tokens: int = 12) -> list[Prompt]:
    tokenizer = load_tokenizer(tiny / "model")
    texts = [f"<|user|>{i + 2} eggs and {7 * i} more, 1 lost<|end|><|assistant|>" for i in range(count)]
    return [
        Prompt(str(i), 0, np.array(tokenizer(text)["input_ids"], dtype=np.int32), max_new_tokens, seed_of(0, i))
        for i, text in enumerate(texts)
    ]


def test_the_same_prompt_and_seed_give_the_same_tokens_in_any_batch(backend: HfBackend, tiny: Path) -> None:
    wanted = prompts(tiny)
    together = {a.id: a.token_ids.tolist() for a in backend.generate(wanted)}
    backend.batch_size = 3
    turned = {a.id: a.token_ids.tolist() for a in backend.generate(wanted[::-1])}
    alone = {p.id: next(iter(backend.generate([p]))).token_ids.tolist() for p in wanted}
    assert together == turned == alone


def test_global_random_state_changes_nothing(backend: HfBackend, tiny: Path) -> None:
    wanted = prompts(tiny, 3)
    torch.manual_seed(1)
    first = [a.token_ids.tolist() for a in backend.generate(wanted)]
    torch.manual_seed(2)
    assert first == [a.token_ids.tolist() for a in backend.generate(wanted)]


def test_an_end_token_on_the_last_place_is_a_stop_and_after_it_a_cut() -> None:
    prompt = Prompt("a", 0, np.array([1], dtype=np.int32), 3, 0)
    assert finish_generation(prompt, np.array([7, 8, END]), [END]).finish == "stop"
    cut = finish_generation(prompt, np.array([7, 8, 9, END]), [END])
    assert (cut.finish, cut.token_ids.tolist()) == ("length", [7, 8, 9])
    assert finish_generation(prompt, np.array([END, END, END]), [END]).token_ids.tolist() == [END]


def test_choose_inverts_the_cumulative_distribution() -> None:
    scores = torch.log(torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3])).repeat(6, 1)
    draws = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 1e-16], dtype=torch.float64)
    assert choose(scores, draws).tolist() == [1, 1, 3, 3, 4, 4]


def test_temperature_zero_is_greedy_and_top_p_cuts_the_tail(tiny: Path) -> None:
    def answers(**settings: float) -> list[list[int]]:
        model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
        engine = HfBackend(model, end_ids=[END], **settings)
        return [a.token_ids.tolist() for a in engine.generate(prompts(tiny))]

    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    greedy = [a.token_ids.tolist() for a in HfBackend(model, end_ids=[END]).generate(prompts(tiny), greedy=True)]
    assert answers(temperature=0.0) == greedy
    assert answers(top_p=1e-6) == greedy
    assert answers(temperature=1e-4) == greedy
    assert answers() != greedy


def test_an_opponent_that_knows_the_answers_is_told(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows whose real answers are the model's own greedy ones, and the same rows with other answers."""
    recipe = make_recipe("space", generate={"temperature": 0.0, "max_new_tokens": 8})
    rates = []
    for name, is_known in (("known", True), ("other", False)):
        run = RunDir(tmp_path / name)
        prepare(run, recipe)
        rows = read_rendered(run.data / "train.parquet")
        model = load_model(Path(recipe.model), dtype=torch.float32, device=CPU)
        asked = [Prompt(row.id, 0, row.prompt_ids, 8, 0) for row in rows]
        greedy = list(HfBackend(model, end_ids=[END]).generate(asked, greedy=True))
        if is_known:
            answers = [replace(row, real_ids=a.token_ids) for row, a in zip(rows, greedy, strict=True)]
            shutil.move(run.data, tmp_path / "prepared")
            with commit(run.data) as folder:
                write_rows(folder / "train.parquet", answers)
                shutil.copyfile(tmp_path / "prepared" / "summary.json", folder / "summary.json")
        engine = partial(open_backend, settings=recipe.generate, dtype="float32", end_ids=(END,), max_length=128)
        generate(Iteration(run, recipe, 0), engine)
        rates.append(read_manifest(run.stage(0, "generate")).info["copy_rate"])
        assert ("so they teach nothing" in capsys.readouterr().err) == is_known
    assert rates == [1.0, 0.0]


@pytest.mark.slow
def test_the_stage_draws_each_row_and_sample_once(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from sparring.loop import play

    recipe = make_recipe("space", iterations=1, generate={"samples": 3, "max_new_tokens": 16})
    run = play(recipe, tmp_path / "run").run
    iteration = Iteration(run, recipe, 0)
    answers = generations(iteration, 0)
    assert sorted(answers) == sorted(row.id for row in iteration.train_rows())
    assert all([a.sample for a in drawn] == [0, 1, 2] for drawn in answers.values())
    assert len({tuple(a.token_ids.tolist()) for drawn in answers.values() for a in drawn}) > len(answers)


class Stumbles:
    """The real engine, which fails at one sample of one row."""

    def __init__(self, engine: HfBackend, row: str) -> None:
        self.engine, self.row = engine, row

    def generate(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Iterator[Generation]:
        for prompt, answer in zip(prompts, self.engine.generate(prompts, greedy=greedy), strict=True):
            yield failed(prompt, "for a test") if (prompt.id, prompt.sample) == (self.row, 1) else answer


@pytest.mark.slow
def test_a_row_without_all_its_answers_is_not_played(
    make_recipe: Callable[..., Recipe], tmp_path: Path, backend: HfBackend
) -> None:
    recipe = make_recipe("space", iterations=1, generate={"samples": 2, "max_new_tokens": 8})
    run = RunDir(tmp_path / "run")
    prepare(run, recipe)
    iteration = Iteration(run, recipe, 0)
    rows = [row.id for row in iteration.train_rows()]

    @contextmanager
    def stumbles(model: Path) -> Iterator[Stumbles]:
        yield Stumbles(backend, rows[3])

    generate(iteration, stumbles)
    info = read_manifest(run.stage(0, "generate")).info
    assert (info["answers"], info["failed"]) == (2 * len(rows) - 1, 1)
    score(iteration, SingleProcess())
    assert [one.group.id for one in load_training_examples(iteration)] == rows[:3] + rows[4:]
    train(iteration, SingleProcess())

    strict = make_recipe("space", generate={"samples": 2, "max_new_tokens": 8}, data={"max_skipped": 0})
    run = RunDir(tmp_path / "strict")
    prepare(run, strict)
    with pytest.raises(RunError, match="could not respond to 1 of 96 prompts, listed above"):
        generate(Iteration(run, strict, 0), stumbles)
    assert not run.stage(0, "generate").exists()
