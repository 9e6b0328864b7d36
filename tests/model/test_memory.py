"""Micro-batches that do not fit into memory, and the search for the largest ones that do."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparring.stages.score
import sparring.stages.train.loop
import sparring.stages.train.micro_batches
import sparring.stages.train.policy
from sparring.errors import RunError
from sparring.loop import play
from sparring.model.logprobs import Scorer
from sparring.model.memory import (
    M_MMAP_THRESHOLD,
    find_micro_batch_tokens,
    halve_micro_batch_tokens,
    inference_micro_batch_tokens,
    return_freed_memory,
    search_range,
)
from sparring.model.packing import PackedBatch
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.stages.train.checkpoint import Checkpointer

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


class SmallMemory(Scorer):
    """Runs out of memory as torch does, above so many tokens."""

    tokens = 300

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        if batch.computed_tokens > self.tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(batch)


def test_a_step_that_runs_out_of_memory_is_retried_with_smaller_micro_batches(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("space", iterations=1, train={"micro_batch_tokens": 2000})
    plain = play(recipe, tmp_path / "plain").run
    for module in (sparring.stages.train.policy, sparring.stages.score):
        monkeypatch.setattr(module, "Scorer", SmallMemory)
    small = play(recipe, tmp_path / "small").run
    assert "Out of memory at 2,000 tokens per micro-batch; retrying with 1,000." in capsys.readouterr().err
    lines = [Results(run.root).training(0) for run in (plain, small)]
    for name in ("loss", "grad_norm"):
        expected, found = ([line[name] for line in run] for run in lines)
        assert found == pytest.approx(expected, rel=1e-3)


def test_a_single_group_that_does_not_fit_stops_with_a_remedy(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparring.stages.train.policy, "Scorer", SmallMemory)
    monkeypatch.setattr(SmallMemory, "tokens", 10)
    with pytest.raises(RunError, match=r"single prompt with its responses .* train.max_length"):
        play(make_recipe("tspin", iterations=1), tmp_path / "run")


@pytest.mark.parametrize(
    ("target", "name", "what"),
    [
        (sparring.stages.train.loop, "load_policy", "loading the model"),
        (SingleProcess, "optimizer_step", "updating the weights"),
        (sparring.stages.train.micro_batches, "forward_backward", "making gradients and the optimizer's state"),
    ],
)
@pytest.mark.usefixtures("searches_from_128")
def test_what_smaller_micro_batches_would_not_change_is_explained(
    target: object, name: str, what: str, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 28.00 GiB.")

    monkeypatch.setattr(target, name, fails)
    recipe = make_recipe("tspin", iterations=1, train={"micro_batch_tokens": "auto"}, data={"held_out": 0, "limit": 16})
    with pytest.raises(RunError, match=f"Out of memory while {what}.*parallel: fsdp2"):
        play(recipe, tmp_path / "run")


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        halve_micro_batch_tokens(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 1000, 10)


@pytest.fixture
def searches_from_128(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search that a GPU makes, on a small scale: from 128 tokens up to 4,096."""
    monkeypatch.setattr(sparring.stages.train.micro_batches, "search_range", lambda device, per_token: (128, 4096))


def micro_batch_tokens_of(run: RunDir, index: int) -> int:
    return json.loads((run.stage(index, "train") / "MANIFEST.json").read_text())["info"]["micro_batch_tokens"]


@pytest.mark.parametrize(("memory", "found"), [(300, 256), (100, 64), (10**6, 1024)])
@pytest.mark.usefixtures("searches_from_128")
def test_auto_finds_the_largest_micro_batch_that_fits(
    memory: int, found: int, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doubles while it fits, halves if the start does not, and stops at the size of a whole step. The trained model has
    the same bytes as with that number in the recipe, so the attempts leave nothing behind."""
    limits = {"data": {"max_skipped": 1.0, "held_out": 0, "limit": 48}, "train": {"max_length": 40, "epochs": 1}}
    monkeypatch.setattr(sparring.stages.train.policy, "Scorer", SmallMemory)
    monkeypatch.setattr(SmallMemory, "tokens", memory)
    auto = {**limits, "train": {**limits["train"], "micro_batch_tokens": "auto"}}
    run = play(make_recipe("space", **auto), tmp_path / "auto").run
    assert [micro_batch_tokens_of(run, t) for t in range(2)] == [found, found]
    monkeypatch.undo()
    named = {**limits, "train": {**limits["train"], "micro_batch_tokens": found}}
    plain = play(make_recipe("space", **named), tmp_path / "named").run
    assert plain.digest(plain.model(0)) == run.digest(run.model(0))


@pytest.mark.usefixtures("searches_from_128")
def test_a_resumed_run_keeps_the_micro_batch_size_it_found(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its third step and resumed with more memory: the same bytes."""
    train = {"micro_batch_tokens": "auto", "checkpoint_minutes": 0}
    recipe = make_recipe("space", iterations=1, train=train)
    monkeypatch.setattr(sparring.stages.train.policy, "Scorer", SmallMemory)
    clean = play(recipe, tmp_path / "clean").run
    real, calls = Checkpointer.save, []

    def stops(checkpoints: Checkpointer, step: int) -> None:
        real(checkpoints, step)
        calls.append(1)
        if len(calls) == 2:
            raise RunError("here")

    monkeypatch.setattr(Checkpointer, "save", stops)
    with pytest.raises(RunError, match="here"):
        play(recipe, tmp_path / "run")
    monkeypatch.setattr(Checkpointer, "save", real)
    monkeypatch.setattr(SmallMemory, "tokens", 10**6)
    run = play(recipe, tmp_path / "run").run
    assert micro_batch_tokens_of(run, 0) == micro_batch_tokens_of(clean, 0) == 256
    assert run.digest(run.model(0)) == clean.digest(clean.model(0))
    other = play(recipe, tmp_path / "other").run
    assert micro_batch_tokens_of(other, 0) > 256, "control: with more memory another size is found"


def test_the_search_for_micro_batch_tokens() -> None:
    """Doubles while it fits, otherwise halves, and never goes below the largest group."""

    def search(memory: int, start: int = 64, ceiling: int = 1000, largest: int = 20) -> tuple[int, list[int]]:
        tried: list[int] = []

        def attempt(micro_batch_tokens: int) -> None:
            tried.append(micro_batch_tokens)
            if micro_batch_tokens > memory:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        return find_micro_batch_tokens(attempt, start, ceiling, largest), tried

    assert search(300) == (256, [64, 128, 256, 512])
    assert search(10**6) == (512, [64, 128, 256, 512])
    assert search(40) == (32, [64, 32]), "what was too much is not tried again"
    assert search(25) == (20, [64, 32, 20])
    with pytest.raises(RunError, match=r"single prompt with its responses \(20 tokens\)"):
        search(19)

    def broken(micro_batch_tokens: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        find_micro_batch_tokens(broken, 64, 1000, 20)


def churn() -> float:
    """MiB that this process holds after making 200 MiB in blocks of up to 8 MiB, with small blocks between that stay,
    and freeing them."""

    def anonymous_mib() -> float:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    before = anonymous_mib()
    freed, stays = [], []
    for number in range(50):
        freed.append(b"x" * (2**20 * (number % 8 + 1)))
        stays.append(b"x" * 2**18)
    freed.clear()
    return anonymous_mib() - before - len(stays) / 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
def test_freed_memory_is_returned() -> None:
    def in_a_fork(call: Callable[[], object]) -> float:
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            call()
            os.write(write, str(churn()).encode())
            os._exit(0)
        os.waitpid(child, 0)
        return float(os.read(read, 100))

    assert in_a_fork(return_freed_memory) < 10
    # a control: to where glibc raises its threshold when a large block is freed
    assert in_a_fork(lambda: ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**25)) > 100


def test_auto_on_a_cpu_bounds_what_activations_take() -> None:
    assert search_range(CPU, 10_000) == (4096, 4096)
    assert search_range(CPU, 2**18) == (1024, 1024)
    assert search_range(CPU, 10**12) == (512, 512)
    start, ceiling = search_range(torch.device("cuda"), 10**12)
    assert start < ceiling
    assert inference_micro_batch_tokens("auto", CPU) == 4096 and inference_micro_batch_tokens(100, CPU) == 100
