"""Checkpoints: every rank writes its rows while it trains, and any number of ranks reads them."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparring.errors import RunError
from sparring.model.optimizers import make_optimizer
from sparring.parallel import SingleProcess
from sparring.parallel.protocol import LocalRows
from sparring.run import manifest
from sparring.run.manifest import hash_file
from sparring.stages.train import checkpoint
from sparring.stages.train.checkpoint import Checkpointer

SECONDS = 30.0
ON_GPU = SingleProcess(device=torch.device("cuda"))
"""Copies tensors and writes them in a thread; none of them has to be there."""
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class RowsOfRank(SingleProcess):
    """A rank among threads: it holds some rows of every tensor, as a sharded one does, or all of them."""

    from_main: Future[str] = field(default_factory=Future)

    def local_rows(self, tensor: Tensor) -> LocalRows:
        rows = torch.atleast_1d(tensor.detach())
        if not self.is_sharded or tensor.ndim == 0:
            return LocalRows(rows, 0, self.rank, self.num_ranks)
        each = -(-len(rows) // self.num_ranks)  # as torch shards: the last ranks may hold fewer rows, or none
        first = min(self.rank * each, len(rows))
        return LocalRows(rows[first : first + each], first, 0, 1)

    def broadcast_from_main(self, text: Callable[[], str]) -> str:
        if self.is_main:
            self.from_main.set_result(text())
        return self.from_main.result(SECONDS)


def on_ranks(count: int, is_sharded: bool, act: Callable[[RowsOfRank], Outcome]) -> list[Outcome]:
    """What `act` returns on each rank."""
    from_main: Future[str] = Future()
    ranks = [RowsOfRank(n, count, n == 0, is_sharded, str(count), from_main=from_main) for n in range(count)]
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(act, ranks))


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Tensors of 5, 1 and 7 rows, after a step."""
    torch.manual_seed(seed)
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(7, 1), "c": nn.Embedding(7, 2)})
    optimizer = make_optimizer("adamw", model, 1e-3, 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [value for p in model.parameters() for _, value in sorted(optimizer.state[p].items())]
    return [*(parameter.detach() for parameter in model.parameters()), *moments]


def saved_by(count: int, is_sharded: bool, work: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = trained(0)
    (work / "metrics.jsonl").write_text("{}\n")

    def save(rank: RowsOfRank) -> None:
        checkpoints = Checkpointer(work, model, optimizer, work / "metrics.jsonl", rank)
        checkpoints.save(1)
        checkpoints.wait()

    on_ranks(count, is_sharded, save)
    return model, optimizer


@pytest.mark.parametrize("is_sharded", [True, False], ids=["sharded", "replicated"])
@pytest.mark.parametrize(("writers", "readers"), [(2, 3), (3, 2), (8, 1), (1, 4)])
def test_any_number_of_ranks_reads_what_another_wrote(
    writers: int, readers: int, is_sharded: bool, tmp_path: Path
) -> None:
    expected = state_of(*saved_by(writers, is_sharded, tmp_path))

    def load(rank: RowsOfRank) -> list[LocalRows]:
        model, optimizer = trained(1)
        assert Checkpointer(tmp_path, model, optimizer, tmp_path / "metrics.jsonl", rank).load() == 1
        return [rank.local_rows(tensor) for tensor in state_of(model, optimizer)]

    for held in on_ranks(readers, is_sharded, load):
        for whole, (rows, first, *_) in zip(expected, held, strict=True):
            assert torch.equal(rows, torch.atleast_1d(whole)[first : first + len(rows)])
    files = list((tmp_path / "step-00000001").glob("rank-*.safetensors"))
    numbers = [sum(tensor.numel() for tensor in load_file(file).values()) for file in files]
    assert len(files) == writers and sum(numbers) == sum(tensor.numel() for tensor in expected), "each row once"


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes meanwhile is not in it; the next one waits; it is hashed where it is written, once."""
    may_write, hashed = threading.Event(), []

    def slowly(*arguments: object) -> None:
        assert may_write.wait(SECONDS)
        save_file(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_file", slowly)
    monkeypatch.setattr(manifest, "hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    (tmp_path / "metrics.jsonl").touch()
    model, optimizer = trained(0)
    before = [tensor.clone() for tensor in state_of(model, optimizer)]
    with Checkpointer(tmp_path, model, optimizer, tmp_path / "metrics.jsonl", ON_GPU) as checkpoints:
        checkpoints.save(1)
        optimizer.step()
        checkpoints.check()
        assert not list(tmp_path.glob("step-*"))
        threading.Timer(0.2, may_write.set).start()
        checkpoints.save(2)
        assert (tmp_path / "step-00000001" / "MANIFEST.json").is_file(), "at most one is being written"
        checkpoints.wait()
    shutil.rmtree(tmp_path / "step-00000002")
    restored = trained(1)
    assert Checkpointer(tmp_path, *restored, tmp_path / "metrics.jsonl", SingleProcess()).load() == 1
    assert all(torch.equal(old, new) for old, new in zip(before, state_of(*restored), strict=True))
    assert hashed.count("rank-00000.safetensors") == 3, "when the two were written, and when one was read"


def test_on_a_cpu_a_checkpoint_is_written_without_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, int] = {}

    def note(tensors: dict[str, Tensor], *others: object) -> None:
        written.update({name: tensor.data_ptr() for name, tensor in tensors.items()})
        save_file(tensors, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "save_file", note)
    (tmp_path / "metrics.jsonl").touch()
    model, optimizer = trained(0)
    with Checkpointer(tmp_path, model, optimizer, tmp_path / "metrics.jsonl", SingleProcess()) as checkpoints:
        checkpoints.save(1)
        assert set(written.values()) == {tensor.data_ptr() for tensor in state_of(model, optimizer)}
        checkpoints.wait()
    assert (tmp_path / "step-00000001" / "MANIFEST.json").is_file()


def test_a_checkpoint_is_committed_when_every_rank_has_written(tmp_path: Path) -> None:
    """The main rank alone: its thread waits for the other's file, and the end of the context ends the wait."""
    (tmp_path / "metrics.jsonl").touch()
    main = RowsOfRank(0, 2, True, True, "2")
    with Checkpointer(tmp_path, *trained(0), tmp_path / "metrics.jsonl", main) as checkpoints:
        checkpoints.save(1)
        (unfinished,) = tmp_path.glob(".step-*")
        deadline = time.monotonic() + SECONDS
        while not list(unfinished.glob("rank-*.xxh3")) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not list(tmp_path.glob("step-*"))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "nothing half written is left"


@pytest.mark.parametrize("device", [SingleProcess(), ON_GPU], ids=["cpu", "gpu"])
def test_a_failed_write_is_raised_by_the_next_step(
    device: SingleProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    (tmp_path / "metrics.jsonl").touch()
    with Checkpointer(tmp_path, *trained(0), tmp_path / "metrics.jsonl", device) as checkpoints:
        deadline = time.monotonic() + SECONDS
        with pytest.raises(RunError, match=r"step-00000001\S+ could not be written: the disk is full"):
            checkpoints.save(1)
            while time.monotonic() < deadline:
                checkpoints.check()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"], "its room is free again"
