"""Forecasts parameters, memory, disk and steps from the model's config. Loads no weights.

`plan`, `doctor` and `run` have their memory from `training_bytes`, which measures a step on fake tensors.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparring.errors import UserError
from sparring.logging import info
from sparring.model.load import load_config, num_parameters, resolve_model
from sparring.model.memory import MINIMUM, activation_bytes, peak_memory_mib, search_range
from sparring.model.optimizers import optimizer_state_bytes, trained_sizes
from sparring.model.quantization import BYTES_PER_WEIGHT
from sparring.parallel import local_device, num_local_devices
from sparring.recipe.schema import Adapter, Recipe
from sparring.run.disk import format_bytes, free_bytes
from sparring.run.manifest import is_committed
from sparring.run.rundir import RunDir
from sparring.stages.train.checkpoint import NUM_KEPT
from sparring.stages.train.dry_run import peak_bytes

BYTES = {"float32": 4, "bfloat16": 2}
UNKNOWN_ARCHITECTURE = (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
"""What transformers raises for a config from which it cannot build a model, and torch for one that depends on numbers,
which fake tensors do not have."""

FITS = 0.95
"""Fraction of a device's memory that a step may need, by the forecast: libraries and fragmentation take some."""

SURELY_FITS = 50
"""A step of few tokens takes a few times what weights, gradients and optimizer state take. Where fifty times of that is
there, `run` traces nothing."""


@dataclass(frozen=True)
class TrainedTensors:
    """Sizes of the tensors that are trained."""

    sizes: tuple[int, ...]
    embedding: int = 0  # of the embeddings, whose optimizer state is never in 8 bits

    @property
    def total(self) -> int:
        return sum(self.sizes) + self.embedding


@dataclass(frozen=True)
class Forecast:
    num_parameters: int
    num_trained: int
    state_bytes: int  # weights, gradients and optimizer state, of all devices that share them
    disk_bytes: int  # the peak, at the end of the last training
    steps_per_iteration: int


def forecast(recipe: Recipe, folder: Path, num_rows: int) -> Forecast:
    """For `num_rows` training rows. Counts that SPIN trains on two iterations' responses from iteration 1 on."""
    model = empty_model(folder)
    train, adapter = recipe.train, recipe.adapter
    num_weights = sum(p.numel() for p in model.parameters())
    trained = trained_tensors(model, adapter)
    frozen = 0 if adapter is None else frozen_bytes(model, BYTES[recipe.weights_dtype], recipe.in_4bit)
    moments = optimizer_state_bytes(train.optimizer, trained.sizes, trained.embedding)
    rows = num_rows * (min(2, recipe.method.needs.rounds) if recipe.iterations > 1 else 1)
    return Forecast(
        num_parameters=num_weights,
        num_trained=trained.total,
        state_bytes=frozen + trained.total * 4 * 2 + moments,
        disk_bytes=disk_bytes(recipe, num_weights, trained, recipe.iterations),
        steps_per_iteration=train.epochs * math.ceil(max(rows, num_rows) / train.batch_size),
    )


def training_bytes(recipe: Recipe, folder: Path, device: str, num_ranks: int, tokens: int | None = None) -> int:
    """Bytes on each device at the peak of an optimizer step.

    `device`: the type of the devices. `tokens`: of a micro-batch; None for what the recipe leads to. With "auto" a GPU
    takes the memory that is there, and at least a group of train.max_length must fit. Raises `UNKNOWN_ARCHITECTURE`.
    """
    config, train = load_config(folder), recipe.train
    if tokens is None and train.micro_batch_tokens != "auto":
        num_responses = len(recipe.method.needs.roles) - 1 + recipe.generate.samples
        tokens = min(train.micro_batch_tokens, train.batch_size * num_responses * train.max_length)
    elif tokens is None:
        per_token = activation_bytes(config, BYTES[train.dtype], checkpointing=train.gradient_checkpointing)
        tokens = search_range(torch.device("cpu"), per_token)[0] if device == "cpu" else train.max_length
    is_sharded = recipe.is_sharded and num_ranks > 1
    total = peak_bytes(recipe, config, tokens, device, num_ranks if is_sharded else 1)
    if recipe.in_4bit:
        model, each = empty_model(folder), BYTES[recipe.weights_dtype]
        total += frozen_bytes(model, each, in_4bit=True) - frozen_bytes(model, each, in_4bit=False)
        total += each * max(layer.weight.numel() for layer in quantized_layers(model))  # one at a time is dequantized
    if num_ranks > 1 and not is_sharded:
        total += 4 * trained_tensors(empty_model(folder), recipe.adapter).total  # DDP's buckets
    if device == "cpu":
        total += round(peak_memory_mib(torch.device("cpu")) * 2**20)  # this process has loaded the same libraries
    return total


def check_memory(recipe: Recipe, run_dir: Path) -> None:
    """Raises `UserError` if training cannot fit into a device's memory, however small its micro-batches become."""
    if recipe.launch == "ray" or not num_remaining(recipe, RunDir(run_dir)):
        return  # the devices are elsewhere, or nothing is left to train
    folder, ranks = resolve_model(recipe.model), local_ranks(recipe)
    available = device_memory(ranks)
    try:
        if SURELY_FITS * forecast(recipe, folder, 1).state_bytes < available:
            return
        whole = frozen_bytes(empty_model(folder), BYTES[recipe.weights_dtype], recipe.in_4bit)
        tokens = min(MINIMUM, recipe.train.max_length)
        required = training_bytes(recipe, folder, local_device().type, ranks, tokens)
    except UNKNOWN_ARCHITECTURE:
        return  # the data stage reports what is wrong with the model
    if whole > available and (recipe.method.needs.opponent or recipe.data.held_out):
        raise UserError(
            f"model: scoring and evaluation hold the whole model on each device, {format_bytes(whole)}, and "
            f"{format_bytes(available)} are there. Choose a smaller model or larger devices, or train an adapter: its "
            "base takes half of that in bfloat16, and an eighth in 4 bits (adapter.load_in_4bit: true)."
        )
    if required > available:
        raise UserError(
            f"train: a step needs at least {format_bytes(required)} on each device, and {format_bytes(available)} are "
            f"there. To make it fit, {memory_remedies(recipe, ranks)}."
        )


def local_ranks(recipe: Recipe) -> int:
    """How many ranks share this machine's devices."""
    if recipe.launch != "torchrun":
        return 1
    return num_local_devices() if recipe.num_processes == "auto" else recipe.num_processes


def device_memory(ranks: int) -> float:
    """Bytes of memory for each of the ranks on this machine."""
    if local_device().type == "cuda":
        return torch.cuda.get_device_properties(0).total_memory  # starts nothing on the device
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def memory_remedies(recipe: Recipe, ranks: int) -> str:
    """What would make training take less memory, in the recipe's words."""
    train, adapter = recipe.train, recipe.adapter
    is_sharded = recipe.is_sharded and recipe.launch != "inline"
    remedies = [
        "set train.gradient_checkpointing: true" if not train.gradient_checkpointing else "",
        "set launch: torchrun and parallel: fsdp2 on several devices" if not is_sharded and not recipe.in_4bit else "",
        "set parallel: fsdp2_offload" if is_sharded and recipe.parallel != "fsdp2_offload" else "",
        "train an adapter" if adapter is None else "",
        "set adapter.load_in_4bit: true" if adapter is not None and not recipe.in_4bit and not is_sharded else "",
        "set train.optimizer: adamw_8bit" if train.optimizer == "adamw" and not is_sharded else "",
    ]
    return ", or ".join(filter(None, remedies)) or "choose a smaller model"


def check_disk(recipe: Recipe, run_dir: Path) -> None:
    """Prints how much disk the remaining iterations need. Raises `UserError` if there cannot be enough."""
    run = RunDir(run_dir)
    remaining = num_remaining(recipe, run)
    if not remaining:
        return
    folder = resolve_model(recipe.model)
    # torch's optimizers keep the same number of bytes for every parameter
    is_uniform = recipe.adapter is None and recipe.train.optimizer != "adamw_8bit"
    try:
        num_weights = num_parameters(folder)
        trained = TrainedTensors((num_weights,)) if is_uniform else trained_tensors(empty_model(folder), recipe.adapter)
    except (SafetensorError, *UNKNOWN_ARCHITECTURE):
        return  # the data stage reports what is wrong with the model
    required, free = disk_bytes(recipe, num_weights, trained, remaining), free_bytes(run.root)
    if required > free:
        raise UserError(
            f"{run.root}: {remaining} more iterations need about {format_bytes(required)}, and {format_bytes(free)} "
            f"are free. Free {format_bytes(required - free)}, or choose a run directory on another disk."
        )
    info(
        f"Disk: about {format_bytes(required)} for {remaining} more iterations and their checkpoints; "
        f"{format_bytes(free)} free."
    )


def num_remaining(recipe: Recipe, run: RunDir) -> int:
    """How many iterations are still to be trained."""
    return sum(not is_committed(run.stage(index, "train")) for index in range(recipe.iterations))


def num_training(recipe: Recipe, num_rows: int) -> int:
    """The number of rows that are not held out, assuming that every prompt has one row."""
    held_out = recipe.data.held_out
    if isinstance(held_out, str):
        return num_rows
    return max(1, num_rows - (round(held_out * num_rows) if isinstance(held_out, float) else held_out))


def disk_bytes(recipe: Recipe, num_weights: int, trained: TrainedTensors, iterations: int) -> int:
    """A float32 model or adapter per iteration, and the checkpoints of one iteration."""
    saves_full_model = recipe.adapter is None or recipe.adapter.merge is not None
    checkpoint = 4 * trained.total + optimizer_state_bytes(recipe.train.optimizer, trained.sizes, trained.embedding)
    # a new checkpoint is complete before the oldest is deleted
    return iterations * 4 * (num_weights if saves_full_model else trained.total) + (NUM_KEPT + 1) * checkpoint


def empty_model(folder: Path) -> PreTrainedModel:
    """The model on the meta device: shapes without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(folder), trust_remote_code=False)
    return model


def trained_tensors(model: PreTrainedModel, adapter: Adapter | None) -> TrainedTensors:
    """Of a full model, or of an adapter: r * in and r * out for every target layer, and out with DoRA."""
    if adapter is None:
        sizes, embedding = trained_sizes(model)
        return TrainedTensors(tuple(sizes), embedding)
    head = model.get_output_embeddings()
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and is_target(name, adapter.target_modules)
    ]
    sizes = [size for layer in layers for size in (adapter.r * layer.in_features, adapter.r * layer.out_features)]
    return TrainedTensors((*sizes, *(layer.out_features for layer in layers if adapter.use_dora)))


def frozen_bytes(model: PreTrainedModel, bytes_per_weight: int, in_4bit: bool) -> int:
    """Of an adapter's base model. 4 bits apply to all linear layers except the output head."""
    total = bytes_per_weight * sum(p.numel() for p in model.parameters())
    if not in_4bit:
        return total
    linear = sum(layer.weight.numel() for layer in quantized_layers(model))
    return total - round(linear * (bytes_per_weight - BYTES_PER_WEIGHT))


def quantized_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """What is quantized with 4 bits."""
    head = model.get_output_embeddings()
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]


def is_target(name: str, targets: str | tuple[str, ...]) -> bool:
    """peft's rule: a string is a regular expression for the full name; a list has names or their last components."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in targets)
