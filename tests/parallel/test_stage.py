"""Stages on several ranks: what they write, what remains when a rank dies or hangs, and how a run resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparring.errors import Interrupted, RunError
from sparring.loop import play, run_stage
from sparring.model.logprobs import Scorer
from sparring.model.packing import PackedBatch
from sparring.parallel import SingleProcess, interrupt
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed, replace_file
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings, seal_recipe
from sparring.run.tracking import Tracker
from sparring.stages import launch
from sparring.stages.launch import run_on_ranks
from sparring.stages.prepare import prepare
from sparring.stages.train.loop import train

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
TRAIN = {"checkpoint_minutes": 0}
SMALL = {"iterations": 1, "generate": {"max_new_tokens": 8}, "train": TRAIN, "threads": 1, "num_processes": 2}


@pytest.fixture(scope="module")
def scored(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory that is ready to train."""
    run = RunDir(tmp_path_factory.mktemp("scored") / "run")
    run.root.mkdir()
    recipe = make_recipe("spin", **SMALL)
    check_settings(run, recipe)
    prepare(run, recipe)
    for stage in ("generate", "score"):
        run_stage(Iteration(run, recipe, 0), stage)
    return run.root


@pytest.fixture
def trainee(scored: Path, make_recipe: MakeRecipe, tmp_path: Path) -> Callable[..., Iteration]:
    """`trainee("name", parallel="fsdp2")`: a copy of `scored`, to be trained with these settings."""

    def make(name: str, **changes: object) -> Iteration:
        root, recipe = tmp_path / name, make_recipe("spin", **{**SMALL, **changes})
        if not root.exists():
            shutil.copytree(scored, root)
        run = RunDir(root)
        replace_file(run.recipe, seal_recipe(recipe))
        return Iteration(run, recipe, 0)

    return make


def metrics(iteration: Iteration) -> list[dict[str, float]]:
    text = (iteration.stage("train") / "metrics.jsonl").read_text()
    clocks = ("seconds", "update_seconds")
    return [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in text.splitlines()]


def weights(iteration: Iteration) -> bytes:
    return (iteration.stage("train") / "model" / "model.safetensors").read_bytes()


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    def at(point: str | None) -> None:
        if point is None:
            monkeypatch.delenv("SPARRING_FAIL_AT")
        else:
            monkeypatch.setenv("SPARRING_FAIL_AT", point)

    return at


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_rank_that_dies_ends_the_stage_and_the_same_command_continues(
    parallel: str,
    trainee: Callable[..., Iteration],
    fail_at: Callable[[str | None], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With as many ranks the bytes are the same; with another number a note says that rounding differs from there."""
    clean = trainee("clean", parallel=parallel)
    run_on_ranks(clean, "train")
    alone = trainee("alone")
    train(alone, SingleProcess())
    for ours, theirs in zip(metrics(clean), metrics(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    files = [load_file(i.stage("train") / "model" / "model.safetensors") for i in (clean, alone)]
    assert files[0].keys() == files[1].keys()
    assert all(np.abs(files[0][name] - files[1][name]).max() < 1e-4 for name in files[0])

    killed = trainee("killed", parallel=parallel)
    fail_at("train-step-of-rank-1:5")
    with pytest.raises(
        RunError, match=r"train of iteration 0 ended early: rank 1 exited with status 137.* same command"
    ):
        run_on_ranks(killed, "train")
    fail_at(None)
    work = killed.run.work(killed.stage("train"))
    kept = max(int(path.name[5:]) for path in work.glob("step-*"))
    assert kept in (3, 4), "the fourth is written while the fifth step runs"
    assert not killed.run.ranks.exists()
    shutil.copytree(killed.run.root, killed.run.root.with_name("other"))
    run_on_ranks(killed, "train")
    assert weights(killed) == weights(clean)
    assert metrics(killed) == metrics(clean)

    other = trainee("other")
    train(other, SingleProcess())
    printed = " ".join(capsys.readouterr().err.split())
    assert f"was written by ranks 2 x {parallel}, and this start has 1" in printed
    assert metrics(other)[:kept] == metrics(clean)[:kept] != metrics(alone)[:kept]
    for ours, theirs in zip(metrics(other), metrics(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_three_ranks(parallel: str, trainee: Callable[..., Iteration], fail_at: Callable[[str | None], None]) -> None:
    """AdamW, whose step depends on its number; sums of three ranks round in an order that must not change."""
    settings = {**TRAIN, "epochs": 1, "optimizer": "adamw", "weight_decay": 0.01, "max_grad_norm": 0.5}
    clean, killed = (trainee(name, parallel=parallel, num_processes=3, train=settings) for name in ("clean", "killed"))
    run_on_ranks(clean, "train")
    fail_at("train-step-of-rank-2:3")
    with pytest.raises(RunError, match=r"rank 2 exited with status 137"):
        run_on_ranks(killed, "train")
    fail_at(None)
    run_on_ranks(killed, "train")
    assert weights(killed) == weights(clean)
    assert metrics(killed) == metrics(clean)
    alone = trainee("alone", train=settings)
    train(alone, SingleProcess())
    for ours, theirs in zip(metrics(clean), metrics(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert any(line["grad_norm"] > 0.5 for line in metrics(alone)), "clipping takes part"


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_the_step_at_hand_is_kept(number: int, trainee: Callable[..., Iteration]) -> None:
    asked = trainee("run", train={**TRAIN, "epochs": 60, "checkpoint_minutes": 1000})
    file = asked.run.work(asked.stage("train")) / "metrics.jsonl"

    def ask() -> None:
        while not (file.is_file() and file.stat().st_size):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=ask, daemon=True).start()
    with interrupt.listening(), pytest.raises(Interrupted, match="the same command continues"):
        run_on_ranks(asked, "train")
    (kept,) = file.parent.glob("step-*")
    assert int(kept.name[5:]) == file.read_text().count("\n")


@pytest.mark.usefixtures("as_users_start_them")
def test_a_rank_that_hangs_ends_the_stage(trainee: Callable[..., Iteration], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARRING_RANK_TIMEOUT", "3")
    hung = trainee("run", train={**TRAIN, "epochs": 200})
    file = hung.run.work(hung.stage("train")) / "metrics.jsonl"
    stopped: list[int] = []

    def stop() -> None:
        while not (file.is_file() and file.stat().st_size):
            time.sleep(0.01)
        stopped.extend(pid for pid, number in ranks_of(hung) if number == 1)
        os.kill(stopped[0], signal.SIGSTOP)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(RunError, match=r"rank 0 lost another rank, which died or did not answer in time"):
        run_on_ranks(hung, "train")
    deadline = time.monotonic() + 60
    while (there := Path(f"/proc/{stopped[0]}").exists()) and time.monotonic() < deadline:
        time.sleep(0.1)  # the kernel takes a moment to clear a killed process away
    assert not there, "it is killed, since a stopped process cannot exit"


def ranks_of(iteration: Iteration) -> Iterator[tuple[int, int]]:
    """(process id, rank) of those that work in a run directory."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"sparring.stages.worker" in words and str(iteration.run.root).encode() in words and words[1] != b"-c":
                environment = dict(e.split(b"=", 1) for e in (path / "environ").read_bytes().split(b"\0") if b"=" in e)
                if b"RANK" in environment:
                    yield int(path.name), int(environment[b"RANK"])
        except OSError:
            continue


def test_memory_that_runs_out_on_one_rank_is_agreed_by_all(
    trainee: Callable[..., Iteration],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The rank of number 1 runs out of memory above 150 tokens."""
    forward = Scorer.forward

    def limited(self: Scorer, batch: PackedBatch) -> torch.Tensor:
        if os.environ.get("RANK") == "1" and batch.computed_tokens > 150:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, batch)

    monkeypatch.setattr(Scorer, "forward", limited)
    small = trainee("small", parallel="fsdp2")
    run_on_ranks(small, "train")
    assert "train restarts with smaller micro-batches" in " ".join(capfd.readouterr().err.split())
    alone = trainee("alone")
    train(alone, SingleProcess())
    for ours, theirs in zip(metrics(small), metrics(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_step_is_tracked_once_though_its_file_is_replaced(
    trainee: Callable[..., Iteration], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps after a checkpoint are made again, with other clocks: where a line ends is another place then."""
    iteration = trainee("run")
    file = iteration.run.work(iteration.stage("train")) / "metrics.jsonl"
    file.parent.mkdir()
    told: list[tuple[int, float]] = []
    monkeypatch.setattr(Tracker, "_log", lambda self, section, metrics, step, at: told.append((step, at)))
    steps = launch.StepFollower(iteration, Tracker())
    epochs = iteration.recipe.train.epochs

    def write(*clocks: float) -> None:
        lines = [{"step": n + 1, "epoch": epochs * (n + 1) / 5, "seconds": clock} for n, clock in enumerate(clocks)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        steps.track()

    write(0.1, 0.1, 0.1)
    write(0.1, 0.123456789, 0.1, 0.1)
    write(0.1)
    write(0.1, 0.1, 0.1, 0.1, 0.1)
    assert [step for step, _ in told] == [1, 2, 3, 4, 5]
    assert [at for _, at in told] == pytest.approx([-0.8, -0.6, -0.4, -0.2, 0.0]), "as on one rank"


@pytest.mark.usefixtures("as_users_start_them")
def test_a_run_on_two_ranks(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage of an iteration, with an adapter, sharded, in a run that one process started: near what that one
    process makes of it, and nothing half done is left."""
    (temporary := tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    recipe = make_recipe("spin", adapter={"r": 4}, **SMALL)
    alone = play(recipe, tmp_path / "alone").run
    shutil.copytree(alone.root, tmp_path / "shared")
    shutil.rmtree(tmp_path / "shared" / "iter-00")
    shared = play(recipe.model_copy(update={"launch": "torchrun", "parallel": "fsdp2"}), tmp_path / "shared").run
    results = [json.loads((run.stage(0, "evaluate") / "metrics.json").read_text()) for run in (shared, alone)]
    assert results[0] == pytest.approx(results[1], rel=1e-3, abs=1e-4)
    assert is_committed(shared.stage(0, "train"))
    assert (shared.root / "report.html").is_file()
    names = {path.name for path in (shared.model(0)).iterdir()}
    assert names == {path.name for path in (alone.model(0)).iterdir()}
    assert not [*shared.root.rglob("*.partial"), *temporary.glob("torchelastic*")]
    ours, theirs = ({path.relative_to(run.root) for path in run.root.rglob("*")} for run in (shared, alone))
    assert ours - theirs == {Path(".ranks.lock")} and theirs <= ours


@pytest.mark.parametrize("adapter", [None, {"r": 4}], ids=["whole model", "adapter"])
def test_sharded_training_in_bfloat16_starts_at_what_was_scored(
    adapter: dict[str, int] | None, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """FSDP2 rounds all weights to bfloat16, those of norms too, which autocast would leave in float32."""
    settings = {**SMALL, "train": {"dtype": "bfloat16", "epochs": 1}, "parallel": "fsdp2", "launch": "torchrun"}
    recipe = make_recipe("spin", adapter=adapter, **settings)
    shutil.copytree(recipe.model, tmp_path / "model")
    weights = load_file(file := tmp_path / "model" / "model.safetensors")
    for name in [name for name in weights if "norm" in name]:
        weights[name] += torch.linspace(0, 0.5, weights[name].numel())  # they are 1 at first, which bfloat16 has
    save_file(weights, file, metadata={"format": "pt"})
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    recipe = recipe.model_copy(update={"model": str(tmp_path / "model")})
    check_settings(run, recipe)
    prepare(run, recipe)
    iteration = Iteration(run, recipe, 0)
    for stage in ("generate", "score", "train"):
        run_stage(iteration, stage)
    assert metrics(iteration)[0]["log_ratio"] == 0
