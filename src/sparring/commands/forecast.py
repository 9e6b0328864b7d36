"""Forecasts parameters, memory, disk and steps from the model's config. Loads no weights."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparring.errors import UserError
from sparring.logging import info
from sparring.model.kernels.chunked import BLOCK, KEPT
from sparring.model.load import load_config, num_parameters, resolve_model
from sparring.model.memory import activation_bytes
from sparring.model.optimizers import optimizer_state_bytes, trained_sizes
from sparring.model.quantization import BYTES_PER_WEIGHT
from sparring.recipe.schema import Adapter, Recipe
from sparring.run.disk import format_bytes, free_bytes
from sparring.run.manifest import is_committed
from sparring.run.rundir import RunDir
from sparring.stages.train.checkpoint import NUM_KEPT

BYTES = {"float32": 4, "bfloat16": 2}
UNKNOWN_ARCHITECTURE = (ValueError, KeyError, AttributeError, ImportError)
"""What transformers raises for a config from which it cannot build a model."""


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
    state_bytes: int  # weights, gradients and optimizer state: exact
    work_bytes: int  # activations and one block of logits of a micro-batch: an estimate
    disk_bytes: int  # the peak, at the end of the last training
    steps_per_iteration: int

    def state_bytes_per_device(self, parallel: str, devices: int) -> float:
        return self.state_bytes / devices if parallel == "fsdp2" else self.state_bytes


def forecast(recipe: Recipe, folder: Path, num_rows: int) -> Forecast:
    """For `num_rows` training rows. Counts that SPIN trains on two iterations' responses from iteration 1 on."""
    model = empty_model(folder)
    train, adapter = recipe.train, recipe.adapter
    num_weights = sum(p.numel() for p in model.parameters())
    trained = trained_tensors(model, adapter)
    frozen = 0 if adapter is None else frozen_bytes(model, BYTES[recipe.weights_dtype], recipe.in_4bit)
    moments = optimizer_state_bytes(train.optimizer, trained.sizes, trained.embedding)
    config = model.config.get_text_config()
    per_token = activation_bytes(model.config, BYTES[train.dtype], checkpointing=train.gradient_checkpointing)
    # with "auto" training takes the memory that is there, and at least one row of the maximum length must fit
    tokens = train.max_length if train.micro_batch_tokens == "auto" else train.micro_batch_tokens
    logits = 0 if train.gradient_checkpointing else KEPT
    rows = num_rows * (min(2, recipe.method.needs.rounds) if recipe.iterations > 1 else 1)
    return Forecast(
        num_parameters=num_weights,
        num_trained=trained.total,
        state_bytes=frozen + trained.total * 4 * 2 + moments,
        work_bytes=tokens * per_token + logits + BLOCK * config.vocab_size * BYTES[train.dtype],
        disk_bytes=disk_bytes(recipe, num_weights, trained, recipe.iterations),
        steps_per_iteration=train.epochs * math.ceil(max(rows, num_rows) / train.batch_size),
    )


def check_disk(recipe: Recipe, run_dir: Path) -> None:
    """Prints how much disk the remaining iterations need. Raises `UserError` if there cannot be enough."""
    run = RunDir(run_dir)
    remaining = sum(not is_committed(run.stage(index, "train")) for index in range(recipe.iterations))
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
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return total - round(linear * (bytes_per_weight - BYTES_PER_WEIGHT))


def is_target(name: str, targets: str | tuple[str, ...]) -> bool:
    """peft's rule: a string is a regular expression for the full name; a list has names or their last components."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in targets)
