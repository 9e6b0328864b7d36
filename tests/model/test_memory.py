"""Steps that memory does not hold, and budgets that look for what it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparring.stages.score
import sparring.stages.train.loop
from sparring.errors import RunError
from sparring.loop import play
from sparring.model.logprobs import Scorer
from sparring.model.memory import find_micro_batch_tokens, inference_micro_batch_tokens, search_range
from sparring.model.packing import PackedBatch
from sparring.parallel.distributed import halve_micro_batch_tokens
from sparring.recipe.schema import Recipe
from sparring.run.rundir import RunDir

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


class SmallMemory(Scorer):
    """Runs out of memory as torch does, above so many tokens."""

    tokens = 300

    def forward(self, layout: PackedBatch) -> torch.Tensor:
        if layout.computed_tokens > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(layout)


def test_a_step_that_runs_out_of_memory_begins_anew_in_smaller_pieces(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("space", iterations=2, train={"micro_batch_tokens": 2000})
    plain = play(recipe, tmp_path / "plain")
    for module in (sparring.stages.train.loop, sparring.stages.score):
        monkeypatch.setattr(module, "Scorer", SmallMemory)
    small = play(recipe, tmp_path / "small")
    assert "memory ran out at 2,000 tokens at a time; going on with 1,000" in capsys.readouterr().err
    for t in range(2):
        for name in ("loss", "grad_norm"):
            values = [
                [json.loads(line)[name] for line in (run.stage(t, "train") / "metrics.jsonl").read_text().splitlines()]
                for run in (plain, small)
            ]
            assert values[0] == pytest.approx(values[1], rel=1e-3)


def test_a_single_group_that_does_not_fit_stops_with_a_remedy(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparring.stages.train.loop, "Scorer", SmallMemory)
    monkeypatch.setattr(SmallMemory, "tokens", 10)
    with pytest.raises(RunError, match=r"single prompt and its answers .* train.max_length"):
        play(make_recipe("tspin", iterations=1), tmp_path / "run")


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        halve_micro_batch_tokens(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1000, 10)


@pytest.fixture
def looks_from_128(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search of a GPU, on a small scale: 128 tokens at first, 4,096 at the most."""
    monkeypatch.setattr(sparring.stages.train.loop, "search_range", lambda device, per_token: (128, 4096))


def budget_of(run: RunDir, index: int) -> int:
    return json.loads((run.stage(index, "train") / "MANIFEST.json").read_text())["info"]["micro_batch_tokens"]


@pytest.mark.parametrize(("memory", "found"), [(300, 256), (100, 64), (10**6, 1024)])
@pytest.mark.usefixtures("looks_from_128")
def test_auto_finds_the_largest_budget_that_memory_holds(
    memory: int, found: int, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It grows to what fits, halves where the start does not, and ends where a step has no more tokens. The model is,
    byte by byte, that of a recipe which names the budget: the attempts leave nothing behind."""
    limits = {"data": {"max_skipped": 1.0}, "train": {"max_length": 40, "epochs": 1}, "evaluate": {"held_out": False}}
    limits["evaluate"]["checker"] = None  # type: ignore[assignment]
    monkeypatch.setattr(sparring.stages.train.loop, "Scorer", SmallMemory)
    monkeypatch.setattr(SmallMemory, "tokens", memory)
    auto = {**limits, "train": {**limits["train"], "micro_batch_tokens": "auto"}}
    run = play(make_recipe("space", **auto), tmp_path / "auto")
    assert [budget_of(run, t) for t in range(2)] == [found, found]
    monkeypatch.undo()
    named = {**limits, "train": {**limits["train"], "micro_batch_tokens": found}}
    plain = play(make_recipe("space", **named), tmp_path / "named")
    assert plain.digest(plain.model(0)) == run.digest(run.model(0))


@pytest.mark.usefixtures("looks_from_128")
def test_a_budget_that_was_found_is_kept_when_the_run_goes_on(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its third step, and continued where there is more memory: the same bytes."""
    train = {"micro_batch_tokens": "auto", "checkpoint_every": 1}
    recipe = make_recipe("space", iterations=1, train=train)
    monkeypatch.setattr(sparring.stages.train.loop, "Scorer", SmallMemory)
    clean = play(recipe, tmp_path / "clean")
    real, calls = sparring.stages.train.loop.save_checkpoint, []

    def stops(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        calls.append(1)
        if len(calls) == 2:
            raise RunError("here")

    monkeypatch.setattr(sparring.stages.train.loop, "save_checkpoint", stops)
    with pytest.raises(RunError, match="here"):
        play(recipe, tmp_path / "run")
    monkeypatch.setattr(sparring.stages.train.loop, "save_checkpoint", real)
    monkeypatch.setattr(SmallMemory, "tokens", 10**6)
    run = play(recipe, tmp_path / "run")
    assert budget_of(run, 0) == budget_of(clean, 0) == 256
    assert run.digest(run.model(0)) == clean.digest(clean.model(0))
    other = play(recipe, tmp_path / "other")
    assert budget_of(other, 0) > 256, "a control: with more memory another budget is found"


def test_the_search_for_a_budget() -> None:
    """Doubled while memory holds it, else halved; and never less than the largest group."""

    def search(memory: int, start: int = 64, ceiling: int = 1000, largest: int = 20) -> tuple[int, list[int]]:
        tried: list[int] = []

        def attempt(budget: int) -> None:
            tried.append(budget)
            if budget > memory:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        return find_micro_batch_tokens(attempt, start, ceiling, largest), tried

    assert search(300) == (256, [64, 128, 256, 512])
    assert search(10**6) == (512, [64, 128, 256, 512])
    assert search(40) == (32, [64, 32]), "what was too much is not tried again"
    assert search(25) == (20, [64, 32, 20])
    with pytest.raises(RunError, match=r"single prompt and its answers \(20 tokens\)"):
        search(19)

    def broken(budget: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        find_micro_batch_tokens(broken, 64, 1000, 20)


def test_auto_on_a_cpu_bounds_what_activations_take() -> None:
    assert search_range(CPU, 10_000) == (4096, 4096)
    assert search_range(CPU, 2**18) == (1024, 1024)
    assert search_range(CPU, 10**12) == (512, 512)
    start, ceiling = search_range(torch.device("cuda"), 10**12)
    assert start < ceiling
    assert inference_micro_batch_tokens("auto", CPU) == 4096 and inference_micro_batch_tokens(100, CPU) == 100
