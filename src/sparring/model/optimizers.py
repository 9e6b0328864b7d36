"""The optimizers that a recipe can name, the bytes of their state, and saving and restoring it.

`rmsprop` and `adamw` are torch's. `adamw_8bit` is bitsandbytes': moments in 8 bits by blocks of 256 numbers
(Dettmers et al., arXiv 2110.02861).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.errors import UserError
from sparring.model.quantization import import_bitsandbytes
from sparring.parallel import Parallel

BLOCK = 256
"""Numbers that share a scale of four bytes."""
SMALLEST_8BIT = 4096
"""Smaller tensors keep their moments in 32 bits."""
NUM_MOMENTS = {"rmsprop": 1, "adamw": 2, "adamw_8bit": 2}


def make_optimizer(name: str, model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """RMSProp as torch and the papers' code have it (alpha 0.99, no momentum), or AdamW (0.9, 0.999).

    `adamw_8bit` keeps the moments of embeddings in 32 bits, as transformers' trainer does.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name != "adamw_8bit":
        optimizer = torch.optim.RMSprop if name == "rmsprop" else torch.optim.AdamW
        # foreach, torch's default on GPUs, makes temporaries as large as all parameters
        return optimizer(trainable, lr=learning_rate, weight_decay=weight_decay, foreach=False)
    import_bitsandbytes()
    from bitsandbytes import optim

    optim = cast(Any, optim)
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()  # it knows parameters by id(), which a deleted model may have left behind
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.override_config(module.weight, "optim_bits", 32)
    return optim.AdamW8bit(trainable, lr=learning_rate, weight_decay=weight_decay)


def optimizer_state_bytes(name: str, sizes: Iterable[int], embedding: int = 0) -> int:
    """Bytes of the moments of tensors with `sizes` numbers. `embedding`: numbers of the embeddings, not in `sizes`."""
    moments, total = NUM_MOMENTS[name], 0
    for size, can_be_8bit in ((embedding, False), *((size, True) for size in sizes)):
        is_8bit = name == "adamw_8bit" and can_be_8bit and size >= SMALLEST_8BIT
        total += moments * (size + 4 * -(-size // BLOCK) if is_8bit else 4 * size)
    return total


def trained_sizes(model: nn.Module) -> tuple[list[int], int]:
    """What `optimizer_state_bytes` takes: numbers in each trained tensor, and in the trained embeddings."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (
        [parameter.numel() for parameter in trained if id(parameter) not in embeddings],
        sum(parameter.numel() for parameter in trained if id(parameter) in embeddings),
    )


def require_bitsandbytes(name: str, device: torch.device) -> None:
    """Refuses an optimizer that this machine cannot run, after trying it. Never replaces it with another."""
    if name != "adamw_8bit":
        return
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer: adamw_8bit needs bitsandbytes, which is not installed. Run pip install 'sparring[4bit]', "
            "or set adamw, whose moments take 8 bytes per parameter."
        )
    try:
        layer = nn.Linear(64, SMALLEST_8BIT // 64, bias=False, device=device)
        optimizer = make_optimizer(name, layer, 1e-3, 0.0)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    except Exception as error:  # libraries that lack a symbol, drivers that are too old: whatever it is
        raise UserError(
            f"train.optimizer: bitsandbytes cannot run {name} on {device}: {type(error).__name__}: {error}. "
            "Use a device that it supports, or set adamw."
        ) from error


def restore_state(optimizer: Any, parameter: nn.Parameter, saved: Mapping[str, Tensor], parallel: Parallel) -> None:
    """Puts what `state_tensors` gave back into the state of a parameter. `saved`: what this rank holds of it."""
    state = optimizer.state[parameter]
    if not hasattr(optimizer, "init_state"):  # torch's: moments beside their parameter, the step count on the CPU
        for key, value in saved.items():
            state[key] = value.reshape(()) if key == "step" else torch.empty_like(parameter)
            if key != "step":
                parallel.local_rows(state[key]).values.copy_(value)
        return
    group = optimizer.param_groups[0]  # there is one
    place = next(i for i, other in enumerate(group["params"]) if other is parameter)
    optimizer.init_state(group, parameter, 0, place)  # bitsandbytes': with quantization maps that all share
    for key, value in saved.items():
        if key == "step":
            state[key] = int(value)
        else:
            state[key].copy_(value.view_as(state[key]))


def state_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What has to be kept of a parameter's state. torch counts steps in a tensor, bitsandbytes in a number."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            # all parameters share one tensor of quantization maps, which safetensors would refuse
            yield key, value.clone() if key.startswith("qmap") else value
        elif key == "step":
            yield key, torch.tensor(value)
