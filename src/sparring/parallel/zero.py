"""ZeRO as DeepSpeed does it: ranks share out moments and gradients (stage 2), and weights (stage 3).

DeepSpeed's optimizer works on flat float32 pieces, copies of the weights. What is kept on disk are whole weights and
moments by name, as without it. The only importer of deepspeed.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from sparring.errors import Refused


def refuse_without_deepspeed(parallel: str) -> None:
    if find_spec("deepspeed") is None:
        raise Refused(
            f"parallel: {parallel} needs DeepSpeed, which is not installed; pip install 'sparring[deepspeed]', or set "
            "parallel: fsdp2, with which torch itself shares weights, gradients and moments out"
        )


def prepare(
    stage: int, module: nn.Module, optimizer: Optimizer, max_norm: float | None, timeout: timedelta
) -> tuple[Any, Any]:
    """DeepSpeed's engine around the module, and its optimizer around ours; torch's process group is there already."""
    deepspeed = _deepspeed()
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # at each exchange torch would say that it has newer names for it
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if not torch.cuda.is_available():  # else it compiles a kernel for inference when it starts
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # it must be told; how a step is cut up is ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm or 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # torch's: they treat each number by itself, so flat pieces as well
        "zero_force_ds_cpu_optimizer": False,
    }
    deepspeed.init_distributed()
    groups = deepspeed.utils.groups
    if groups._WORLD_GROUP is None:  # its own would wait half an hour for a rank that hangs
        groups._WORLD_GROUP = dist.new_group(timeout=timeout)
    if stage == 3:  # parameter by parameter, so that no device ever holds all
        deepspeed.zero.Init(module=module, config_dict_or_path=settings)
    engine, theirs, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return engine, theirs


def begin_pass(engine: Any, *, is_last: bool) -> None:
    """Before the forward and backward pass of a micro-batch."""
    engine.set_gradient_accumulation_boundary(is_last)


def backward(loss: Tensor, engine: Any) -> None:
    engine.backward(loss)


def update(engine: Any) -> float:
    """`distributed.update`: DeepSpeed passes over a step whose gradient is not finite."""
    engine.step()
    return math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm())


def whole(parameter: Tensor) -> Tensor:
    """In the memory of the CPU; every rank must ask for it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu().contiguous()
    with _deepspeed().zero.GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()


def moments(optimizer: Any, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Of a parameter, by name, whole. Every rank must ask for them."""
    whole = _deepspeed().utils.safe_get_full_optimizer_state
    for key, value in _pieces(optimizer)[0][1].items():
        yield key, value.clone() if key == "step" else whole(parameter, key)


@torch.no_grad()
def restore(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]
) -> None:
    """Puts back what `whole` and `moments` gave, the moments under NAME/KEY."""
    deepspeed = _deepspeed()
    for name, saved in weights.items():
        parameter = parameters[name]
        gathered = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(gathered, modifier_rank=0, enabled=bool(gathered)):
            parameter.copy_(saved)
    optimizer.refresh_fp32_params()
    kinds = {name.rpartition("/")[2]: saved for name, saved in moments.items()}
    for flat, state in _pieces(optimizer):  # torch makes them at the first step
        for key, saved in kinds.items():
            state[key] = saved.clone() if key == "step" else torch.zeros_like(flat)
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, saved in moments.items():
        parameter, _, key = name.rpartition("/")
        if key != "step":
            _set_moment(parameters[parameter], saved, key)


def _set_moment(parameter: Any, saved: Tensor, key: str) -> None:
    utils, saved = _deepspeed().utils, saved.to(parameter.device)
    if not hasattr(parameter, "ds_tensor"):
        utils.safe_set_full_optimizer_state(parameter, saved, key)
        return
    # the same function would cut the last rank's piece where the ranks do not divide the numbers: pieces are padded
    size, rank = parameter.ds_tensor.numel(), dist.get_rank()
    padded = functional.pad(saved.flatten(), (0, size * dist.get_world_size() - saved.numel()))
    utils.safe_set_local_optimizer_state(parameter, padded[rank * size :][:size], key)


def _deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it says that it has found no device
    import deepspeed  # pyright: ignore[reportMissingImports]

    return deepspeed


def _pieces(optimizer: Any) -> Sequence[tuple[Tensor, dict[str, Any]]]:
    """The flat float32 pieces of this rank, each with torch's state of it."""
    two = hasattr(optimizer, "single_partition_of_fp32_groups")
    pieces = optimizer.single_partition_of_fp32_groups if two else optimizer.fp32_partitioned_groups_flat
    return [(piece, optimizer.optimizer.state[piece]) for piece in pieces]
