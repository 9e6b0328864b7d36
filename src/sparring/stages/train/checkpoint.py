"""What a step needs to continue, and nothing else: weights, moments, the step, the metrics so far.

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

from sparring.errors import Refused, Stopped
from sparring.logging import say
from sparring.parallel import distributed, zero
from sparring.run.disk import writing
from sparring.run.manifest import commit, failpoint, verify, write_json
from sparring.stages.train.optimizers import restore_state, state_tensors

KEEP = 2


def save_checkpoint(work: Path, step: int, model: nn.Module, optimizer: Optimizer, metrics: Path) -> None:
    """Commits work/step-N and removes all but the last two. Every rank must call this; the first one writes.

    Weights and moments are put together on the first rank, so that any number of ranks can go on from them.
    """
    moments = _gathered(_moments(model, optimizer))
    weights = _gathered(trained(model))
    if distributed.is_first():
        _write(work, step, weights, moments, metrics)
    distributed.meet()


def _write(work: Path, step: int, weights: dict[str, Tensor], moments: dict[str, Tensor], metrics: Path) -> None:
    needs = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))
    with commit(work / f"step-{step:08d}", needs=needs) as folder:
        save_file(weights, folder / "model.safetensors")
        failpoint("checkpoint-model")
        save_file(moments, folder / "optimizer.safetensors")
        failpoint("checkpoint-optimizer")
        shutil.copyfile(metrics, folder / "metrics.jsonl")
        failpoint("checkpoint-metrics")
        write_json(folder / "state.json", {"step": step, "ranks": distributed.way()})
    failpoint("before-prune")
    for old in sorted(work.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def load_checkpoint(
    work: Path, model: nn.Module, optimizer: Optimizer, metrics: Path, *, other_ranks: bool = False
) -> int:
    """Restores the newest checkpoint that verifies, and returns its step; 0 if there is none. For every rank.

    One that another number of ranks made, or ranks that train in another way, is refused unless `other_ranks`.
    """
    name = distributed.first_says(lambda: _newest(work, metrics))
    if not name:
        return 0
    state = json.loads((work / name / "state.json").read_text(encoding="utf-8"))
    before, now = state.get("ranks", "1"), distributed.way()
    if before != now and not other_ranks:
        raise Refused(
            f"{work / name} was made by ranks {before}, and this start has {now}: the steps after it would round "
            "otherwise. Start with as many ranks in the same way, or set resume_with_other_ranks=true"
        )
    _restore(work / name, model, optimizer)
    return state["step"]


def _newest(work: Path, metrics: Path) -> str:
    """The name of the newest checkpoint that verifies, whose metrics it restores; empty if there is none."""
    for folder in sorted(work.glob("step-*"), reverse=True):
        try:
            verify(folder)
        except Stopped as problem:
            say(f"  passing over a damaged checkpoint: {problem}")
            shutil.rmtree(folder)  # ours, and made again on the way
            continue
        with writing(metrics):
            shutil.copyfile(folder / "metrics.jsonl", metrics)
        return folder.name
    metrics.unlink(missing_ok=True)
    return ""


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What changes from step to step: of a model with an adapter, the adapter."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def trained_state(model: nn.Module) -> dict[str, Tensor] | None:
    """What ranks hold in parts, whole, on the first rank; None where the model itself is whole. For every rank."""
    if not distributed.is_sharded():
        return None
    whole = _gathered(trained(model))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)  # tied weights under both names
    return {name: whole[names[id(p)]] for name, p in every if names[id(p)] in whole}


def _moments(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    return (
        (f"{name}/{key}", value)
        for name, parameter in trained(model)
        for key, value in (
            zero.moments(optimizer, parameter)
            if distributed.zero_stage()
            else state_tensors(optimizer.state[parameter])
        )
    )


def _gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """On the first rank, whole; the others help and keep nothing."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        value = distributed.whole(tensor)
        if distributed.is_first():
            found[name] = value
    return found


@torch.no_grad()
def _restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    parameters = dict(model.named_parameters())
    weights, moments = load_file(folder / "model.safetensors"), load_file(folder / "optimizer.safetensors")
    if distributed.zero_stage():
        zero.restore(optimizer, parameters, weights, moments)
        return
    for name, saved in weights.items():
        parameters[name].copy_(distributed.like(saved, parameters[name]))
    states: dict[str, dict[str, Tensor]] = {}
    for name, saved in moments.items():
        parameter, _, key = name.rpartition("/")
        states.setdefault(parameter, {})[key] = saved
    own = distributed.unwrapped(optimizer)
    own.state.clear()
    for name, state in states.items():
        restore_state(own, parameters[name], state)
