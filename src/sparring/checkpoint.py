"""What a step needs to continue, and nothing else: weights, moments, the step, the metrics so far.

There is no random state and no data-loader state: both are functions of the step. No pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.commits import commit, failpoint, verify, write_json
from sparring.disk import writing
from sparring.errors import Stopped
from sparring.progress import say

KEEP = 2


def save_checkpoint(work: Path, step: int, model: nn.Module, optimizer: Optimizer, metrics: Path) -> None:
    """Commits work/step-N and removes all but the last two."""
    moments = _moments(model, optimizer)
    weights = {name: parameter.detach().cpu() for name, parameter in trained(model)}
    needs = sum(tensor.nbytes for tensor in (*weights.values(), *moments.values()))
    with commit(work / f"step-{step:08d}", needs=needs) as folder:
        save_file(weights, folder / "model.safetensors")
        failpoint("checkpoint-model")
        save_file(moments, folder / "optimizer.safetensors")
        failpoint("checkpoint-optimizer")
        shutil.copyfile(metrics, folder / "metrics.jsonl")
        failpoint("checkpoint-metrics")
        write_json(folder / "state.json", {"step": step})
    failpoint("before-prune")
    for old in sorted(work.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def load_checkpoint(work: Path, model: nn.Module, optimizer: Optimizer, metrics: Path) -> int:
    """Restores the newest checkpoint that verifies, and returns its step; 0 if there is none."""
    for folder in sorted(work.glob("step-*"), reverse=True):
        try:
            verify(folder)
        except Stopped as problem:
            say(f"  passing over a damaged checkpoint: {problem}")
            shutil.rmtree(folder)  # ours, and made again on the way
            continue
        _restore(folder, model, optimizer)
        with writing(metrics):
            shutil.copyfile(folder / "metrics.jsonl", metrics)
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"]
    metrics.unlink(missing_ok=True)
    return 0


def trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What changes from step to step: of a model with an adapter, the adapter."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in trained(model)
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def _restore(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    parameters = dict(model.named_parameters())
    for name, saved in load_file(folder / "model.safetensors").items():
        parameters[name].copy_(saved)
    optimizer.state.clear()
    for name, saved in load_file(folder / "optimizer.safetensors").items():
        parameter, _, key = name.rpartition("/")
        # torch keeps the step counter on the CPU, the moments beside their parameter
        device = "cpu" if key == "step" else parameters[parameter].device
        optimizer.state[parameters[parameter]][key] = saved.to(device)
