"""What a step needs to continue, and nothing else: weights, optimizer state, the step, the metrics so far.

There is no random state and no data-loader state: both are functions of the step. No pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.errors import RunError
from sparring.logging import info
from sparring.model.optimizers import restore_state, state_tensors
from sparring.parallel import Parallel
from sparring.run.disk import writing
from sparring.run.manifest import commit, failpoint, verify, write_json

NUM_KEPT = 2


def save_checkpoint(
    work: Path, step: int, model: nn.Module, optimizer: Optimizer, metrics: Path, parallel: Parallel
) -> None:
    """Commits work/step-N and removes all but the last two. Every rank must call this; the main rank writes.

    Weights and optimizer state are gathered, so that any number of ranks can continue from them.
    """
    state = _gather_on_main(_optimizer_state(model, optimizer, parallel), parallel)
    weights = _gather_on_main(trained_parameters(model), parallel)
    if parallel.is_main:
        required_bytes = sum(tensor.nbytes for tensor in (*weights.values(), *state.values()))
        with commit(work / f"step-{step:08d}", required_bytes=required_bytes) as folder:
            save_file(weights, folder / "model.safetensors")
            failpoint("checkpoint-model")
            save_file(state, folder / "optimizer.safetensors")
            failpoint("checkpoint-optimizer")
            shutil.copyfile(metrics, folder / "metrics.jsonl")
            failpoint("checkpoint-metrics")
            write_json(folder / "state.json", {"step": step, "topology": parallel.topology})
        failpoint("before-prune")
        for old in sorted(work.glob("step-*"))[:-NUM_KEPT]:
            shutil.rmtree(old)
    parallel.barrier()


def load_checkpoint(work: Path, model: nn.Module, optimizer: Optimizer, metrics: Path, parallel: Parallel) -> int:
    """Restores the newest checkpoint that verifies, and returns its step, or 0 without one. For every rank."""
    name = parallel.broadcast_from_main(lambda: _newest(work, metrics))
    if not name:
        return 0
    state = json.loads((work / name / "state.json").read_text(encoding="utf-8"))
    if state["topology"] != parallel.topology:
        info(
            f"note: {work / name} was written by ranks {state['topology']}, and this start has {parallel.topology}. "
            "The steps from here on may differ in rounding."
        )
    _restore(work / name, model, optimizer, parallel)
    return state["step"]


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


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What changes from step to step: of a model with an adapter, the adapter."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def trained_state(model: nn.Module, parallel: Parallel) -> dict[str, Tensor] | None:
    """The gathered weights on the main rank if they are sharded; None if the model itself has them. For every rank."""
    if not parallel.is_sharded:
        return None
    full = _gather_on_main(trained_parameters(model), parallel)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)  # tied weights under both names
    return {name: full[names[id(p)]] for name, p in every if names[id(p)] in full}


def _optimizer_state(model: nn.Module, optimizer: Optimizer, parallel: Parallel) -> Iterator[tuple[str, Tensor]]:
    state = parallel.unwrap(optimizer).state
    return (
        (f"{name}/{key}", value)
        for name, parameter in trained_parameters(model)
        for key, value in state_tensors(state[parameter])
    )


def _gather_on_main(tensors: Iterable[tuple[str, Tensor]], parallel: Parallel) -> dict[str, Tensor]:
    """Full tensors on the main rank; the others take part and keep nothing."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        value = parallel.gather_full(tensor)
        if parallel.is_main:
            found[name] = value
    return found


@torch.no_grad()
def _restore(folder: Path, model: nn.Module, optimizer: Optimizer, parallel: Parallel) -> None:
    parameters = dict(model.named_parameters())
    for name, saved in load_file(folder / "model.safetensors").items():
        parameters[name].copy_(parallel.shard_like(saved, parameters[name]))
    states: dict[str, dict[str, Tensor]] = {}
    for name, saved in load_file(folder / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("/")
        states.setdefault(parameter, {})[key] = saved
    unwrapped = parallel.unwrap(optimizer)
    unwrapped.state.clear()
    for name, state in states.items():
        restore_state(unwrapped, parameters[name], state, parallel)
