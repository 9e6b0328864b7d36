"""Makes the optimizer of a recipe, refuses one that does not run here, keeps its state and restores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.errors import Refused
from sparring.model.quantization import import_bitsandbytes
from sparring.parallel import distributed
from sparring.recipe.optimizer_specs import KINDS, LEAST_8BIT


def make_optimizer(name: str, model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """RMSProp as torch and the papers' code have it (alpha 0.99, no momentum), or AdamW (0.9, 0.999).

    Of an 8-bit one the embeddings' moments stay in 32 bits, as in transformers' trainer.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = KINDS[name]
    if kind.ours is None:
        of_torch = torch.optim.RMSprop if name == "rmsprop" else torch.optim.AdamW
        return of_torch(trainable, lr=learning_rate, weight_decay=weight_decay)
    import_bitsandbytes()
    from bitsandbytes import optim

    if kind.is_8bit:
        manager = cast(Any, optim).GlobalOptimManager.get_instance()
        manager.initialize()  # it knows parameters by id(), which those of a model that is gone have left behind
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.override_config(module.weight, "optim_bits", 32)
    return getattr(optim, kind.ours)(trainable, lr=learning_rate, weight_decay=weight_decay)


def refuse_without_bitsandbytes(name: str, device: torch.device) -> None:
    """Refuses an optimizer that this machine cannot run: it is tried. Never another one in its place."""
    kind = KINDS[name]
    if kind.ours is None:
        return
    other = "adamw" if kind.moments == 2 else "rmsprop"
    if find_spec("bitsandbytes") is None:
        raise Refused(
            f"train.optimizer: {name} is bitsandbytes', which is not installed; pip install 'sparring[4bit]', or set "
            f"{other}, whose moments take {4 * kind.moments} bytes per parameter"
        )
    if kind.is_paged and device.type != "cuda":
        unpaged = "adamw_8bit" if kind.is_8bit else "adamw"
        raise Refused(
            f"train.optimizer: {name} moves its moments between a GPU and the machine, and this is {device}; "
            f"set {unpaged}, which is the same without pages"
        )
    try:
        layer = nn.Linear(64, LEAST_8BIT // 64, bias=False, device=device)
        optimizer = make_optimizer(name, layer, 1e-3, 0.0)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    except Exception as error:  # libraries that lack a symbol, drivers that are too old: whatever it is
        raise Refused(
            f"train.optimizer: bitsandbytes does not run {name} on {device}: {type(error).__name__}: {error}. "
            f"Use a device that it supports, or set {other}"
        ) from error


def trained_sizes(model: nn.Module) -> tuple[list[int], int]:
    """What `moment_bytes` takes: numbers in each tensor that is trained, and in the embeddings among them."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return (
        [parameter.numel() for parameter in trained if id(parameter) not in embeddings],
        sum(parameter.numel() for parameter in trained if id(parameter) in embeddings),
    )


def restore_state(optimizer: Any, parameter: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
    """What `state_tensors` gave, into the state of a parameter."""
    state = optimizer.state[parameter]
    if not hasattr(optimizer, "init_state"):  # torch's: the moments beside their parameter, the count on the CPU
        state |= {key: value if key == "step" else distributed.like(value, parameter) for key, value in saved.items()}
        return
    group = optimizer.param_groups[0]  # there is one
    place = next(i for i, other in enumerate(group["params"]) if other is parameter)
    optimizer.init_state(group, parameter, 0, place)  # bitsandbytes': in pages, with maps that all share
    for key, value in saved.items():
        if key == "step":
            state[key] = int(value)
        else:
            state[key].copy_(value)


def state_tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What has to be kept of a parameter's state. torch counts steps in a tensor, bitsandbytes in a number."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            # the maps of all parameters are one tensor, which safetensors would refuse
            yield key, value.clone() if key.startswith("qmap") else value
        elif key == "step":
            yield key, torch.tensor(value)
