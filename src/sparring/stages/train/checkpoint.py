"""What a step needs to continue, and nothing else: weights, optimizer state, the step, the metrics so far.

There is no random state and no data-loader state: both are functions of the step. No pickle.

Each rank writes its rows of every tensor to its own file, `rank-00000.safetensors`: from a GPU a copy of them, in a
thread while it trains. The main rank commits once every rank's file is there. Any number of ranks can continue from
these files: each reads the rows that it holds then, whichever file has them.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.errors import RunError
from sparring.logging import info
from sparring.model.optimizers import restore_state, state_tensors
from sparring.parallel import Parallel
from sparring.run.disk import writing
from sparring.run.manifest import commit_folder, commit_part, failpoint, hash_beside, make_folder, verify, write_json

NUM_KEPT = 2
POLL_SECONDS = 0.1
FIRST_ROWS = "first_rows"
WEIGHTS, STATE = "weights", "state"


class Checkpointer:
    """Saves and restores a model in training. Every rank has one, and all must make the same calls.

    A context: at its end a checkpoint that is being written is committed if it is complete, else removed.
    """

    def __init__(self, work: Path, model: nn.Module, optimizer: Optimizer, metrics: Path, parallel: Parallel) -> None:
        self.work, self.model, self.metrics, self.parallel = work, model, metrics, parallel
        self.optimizer = parallel.unwrap(optimizer)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._in_flight: tuple[Path, Future[None]] | None = None
        self._is_closing = Event()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closing.set()
        self._thread.shutdown()
        if self._in_flight is not None and self.parallel.is_main:
            shutil.rmtree(self._in_flight[0], ignore_errors=True)

    def save(self, step: int) -> None:
        """Begins to write work/step-N, and returns once this rank's part is copied to CPU memory.

        On a CPU it returns once that part is written: a copy would cost as much memory as the weights and the
        optimizer's state, and writing it would take the cores from training.

        At most one checkpoint is being written: the next one waits for it. Raises why that one could not be written.
        """
        self.wait()
        is_on_cpu = self.parallel.device.type == "cpu"
        tensors: dict[str, Tensor] = {}
        first_rows: dict[str, int] = {}
        for name, tensor in self._named_tensors():
            rows, first = self.parallel.local_rows(tensor).to_write()
            if len(rows):
                tensors[name] = rows.to("cpu", copy=not is_on_cpu).contiguous()
                first_rows[name] = first
        num_bytes = sum(tensor.nbytes for tensor in tensors.values()) * self.parallel.num_ranks
        folder = self.work / self.parallel.broadcast_from_main(lambda: self._make_folder(step, num_bytes))
        written = self._thread.submit(self._write, folder, tensors, first_rows)
        self._in_flight = folder, self._thread.submit(self._commit, step, folder, written)
        del tensors
        if is_on_cpu:
            written.result()

    def wait(self) -> None:
        """Until the checkpoint in flight, if there is one, is on disk. Raises why it could not be written."""
        if self._in_flight is not None:
            self._in_flight[1].result()
            self._in_flight = None

    def check(self) -> None:
        """Raises why the checkpoint in flight could not be written, if it has failed by now."""
        if self._in_flight is not None and self._in_flight[1].done():
            self.wait()

    def load(self) -> int:
        """Restores the newest checkpoint that verifies, and returns its step, or 0 without one."""
        name = self.parallel.broadcast_from_main(lambda: _newest(self.work, self.metrics))
        if not name:
            return 0
        state = json.loads((self.work / name / "state.json").read_text(encoding="utf-8"))
        if state["topology"] != self.parallel.topology:
            info(
                f"note: {self.work / name} was written by ranks {state['topology']}, and this start has "
                f"{self.parallel.topology}. The steps from here on may differ in rounding."
            )
        with SavedRows(self.work / name) as saved:
            self._restore(saved)
        return state["step"]

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in trained_parameters(self.model):
            yield f"{WEIGHTS}/{name}", parameter
            for key, value in state_tensors(self.optimizer.state[parameter]):
                yield f"{STATE}/{name}/{key}", value

    def _make_folder(self, step: int, num_bytes: int) -> str:
        """The name of a new folder that has everything but the ranks' files."""
        final = self.work / f"step-{step:08d}"
        folder = self.work / f".{final.name}.tmp-{uuid.uuid4().hex}"
        try:
            with writing(final, num_bytes):
                make_folder(folder)
                shutil.copyfile(self.metrics, folder / "metrics.jsonl")
                failpoint("checkpoint-metrics")
                write_json(folder / "state.json", {"step": step, "topology": self.parallel.topology})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder.name

    def _write(self, folder: Path, tensors: dict[str, Tensor], first_rows: dict[str, int]) -> None:
        """In the thread: this rank's file."""
        metadata = {FIRST_ROWS: json.dumps(first_rows)}
        commit_part(folder / _file_name(self.parallel.rank), lambda path: save_file(tensors, path, metadata))
        tensors.clear()
        failpoint("checkpoint-rank")

    def _commit(self, step: int, folder: Path, written: Future[None]) -> None:
        """In the thread: the main rank waits for the others' files and commits, so that training need not."""
        written.result()
        if not self.parallel.is_main:
            return
        every = [folder / _file_name(rank) for rank in range(self.parallel.num_ranks)]
        while not all(hash_beside(path).is_file() for path in every):
            if self._is_closing.wait(POLL_SECONDS):
                return
        commit_folder(folder, self.work / f"step-{step:08d}")
        failpoint("before-prune")
        for old in sorted(self.work.glob("step-*"))[:-NUM_KEPT]:
            shutil.rmtree(old)

    @torch.no_grad()
    def _restore(self, saved: SavedRows) -> None:
        self.optimizer.state.clear()
        for name, parameter in trained_parameters(self.model):
            local = self.parallel.local_rows(parameter)
            rows = range(local.first, local.first + len(local.values))
            local.values.copy_(saved.read(f"{WEIGHTS}/{name}", rows).view_as(local.values))
            prefix = f"{STATE}/{name}/"
            state = {}
            for key in [key.removeprefix(prefix) for key in saved.places if key.startswith(prefix)]:
                # bitsandbytes' state has rows of its own, which are never sharded; nor is a count of steps
                is_like_parameter = self.parallel.is_sharded and key != "step"
                state[key] = saved.read(prefix + key, rows if is_like_parameter else None)
            if state:
                restore_state(self.optimizer, parameter, state, self.parallel)


class SavedRows:
    """The tensors of a checkpoint, read from the files of as many ranks as have written it. A context."""

    def __init__(self, folder: Path) -> None:
        self._files = ExitStack()
        self.places: dict[str, list[tuple[int, Any]]] = {}
        """Name -> (number of its first row, slice) for each file that has rows of it, in their order."""
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = self._files.enter_context(safe_open(path, "pt"))
            for name, first in json.loads(file.metadata()[FIRST_ROWS]).items():
                self.places.setdefault(name, []).append((first, file.get_slice(name)))
        for places in self.places.values():
            places.sort(key=lambda place: place[0])

    def __enter__(self) -> SavedRows:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read(self, name: str, rows: range | None = None) -> Tensor:
        """Rows of a tensor, or all of them, in CPU memory."""
        found = []
        for first, saved in self.places[name]:
            count = saved.get_shape()[0]
            start, end = (0, count) if rows is None else (rows.start - first, rows.stop - first)
            found.append(saved[min(max(start, 0), count) : max(min(end, count), 0)])
        return torch.cat(found)


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What changes from step to step: of a model with an adapter, the adapter."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def trained_state(model: nn.Module, parallel: Parallel) -> dict[str, Tensor] | None:
    """The whole weights on the main rank if they are sharded; None if the model itself has them. For every rank."""
    if not parallel.is_sharded:
        return None
    whole = {id(parameter): parallel.gather_on_main(parameter) for _, parameter in trained_parameters(model)}
    every = model.named_parameters(remove_duplicate=False)  # tied weights under both names
    return {name: tensor for name, parameter in every if (tensor := whole.get(id(parameter))) is not None}


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _newest(work: Path, metrics: Path) -> str:
    """The name of the newest checkpoint that verifies, whose metrics it restores; empty without one."""
    for folder in sorted(work.glob("step-*"), reverse=True):
        try:
            verify(folder)
        except RunError as problem:
            info(f"  Skipping a corrupted checkpoint: {problem}")
            shutil.rmtree(folder)  # ours, and written again on the way
            continue
        with writing(metrics):
            shutil.copyfile(folder / "metrics.jsonl", metrics)
        return folder.name
    metrics.unlink(missing_ok=True)
    return ""
