"""What a recipe will need: parameters, memory, disk, steps. From the model's config alone; nothing is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
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


@dataclass(frozen=True)
class Trained:
    """Numbers in the tensors that are trained."""

    sizes: tuple[int, ...]
    embedding: int = 0  # in embeddings, apart: its moments are never in 8 bits

    @property
    def total(self) -> int:
        return sum(self.sizes) + self.embedding


@dataclass(frozen=True)
class Forecast:
    num_parameters: int
    num_trained: int
    frozen_bytes: int  # weights that are not trained
    state_bytes: int  # weights, gradients, moments: exact
    work_bytes: int  # activations and the block of logits of a micro-batch: a rule of thumb
    disk_bytes: int  # at the most, at the end of the last training
    steps_per_iteration: int

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.work_bytes

    def state_on_each(self, parallel: str, devices: int) -> float:
        """Bytes of weights, gradients and optimizer state on each device."""
        return self.state_bytes / devices if parallel == "fsdp2" else self.state_bytes


def forecast(recipe: Recipe, folder: Path, num_rows: int) -> Forecast:
    """For `num_rows` training rows; SPIN's second round doubles the steps from iteration 1 on, which is counted."""
    model = empty_model(folder)
    train, adapter = recipe.train, recipe.adapter
    num_weights = sum(p.numel() for p in model.parameters())
    trained = trained_tensors(model, adapter)
    frozen = 0 if adapter is None else frozen_bytes(model, BYTES[recipe.weights_dtype], recipe.in_4bit)
    moments = optimizer_state_bytes(train.optimizer, trained.sizes, trained.embedding)
    config = model.config.get_text_config()
    per_token = activation_bytes(model.config, BYTES[train.dtype], checkpointing=train.gradient_checkpointing)
    asked = train.micro_batch_tokens
    tokens = train.max_length if asked == "auto" else asked  # which takes what there is; a row of that length must fit
    logits = 0 if train.gradient_checkpointing else KEPT
    rows = num_rows * (min(2, recipe.method.needs.rounds) if recipe.iterations > 1 else 1)
    return Forecast(
        num_parameters=num_weights,
        num_trained=trained.total,
        frozen_bytes=frozen,
        state_bytes=frozen + trained.total * 4 * 2 + moments,
        work_bytes=tokens * per_token + logits + BLOCK * config.vocab_size * BYTES[train.dtype],
        disk_bytes=disk_bytes(recipe, num_weights, trained, recipe.iterations),
        steps_per_iteration=train.epochs * math.ceil(max(rows, num_rows) / train.batch_size),
    )


def check_disk(recipe: Recipe, run_dir: Path) -> None:
    """Says how much disk the remaining iterations need, and refuses a run for which there cannot be enough."""
    run = RunDir(run_dir)
    remaining = sum(not is_committed(run.stage(index, "train")) for index in range(recipe.iterations))
    if not remaining:
        return
    folder = resolve_model(recipe.model)
    num_weights = num_parameters(folder)
    # torch's optimizers take the same bytes for every number, whatever its tensor
    is_simple = recipe.adapter is None and recipe.train.optimizer != "adamw_8bit"
    trained = Trained((num_weights,)) if is_simple else trained_tensors(empty_model(folder), recipe.adapter)
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
    """Of the rows, those that are not held out; a row is taken for a prompt."""
    held_out = recipe.data.held_out
    if isinstance(held_out, str):
        return num_rows
    return max(1, num_rows - (round(held_out * num_rows) if isinstance(held_out, float) else held_out))


def disk_bytes(recipe: Recipe, num_weights: int, trained: Trained, iterations: int) -> int:
    """What training keeps: a model or an adapter per iteration, in float32, and the checkpoints of one iteration."""
    is_whole = recipe.adapter is None or recipe.adapter.merge is not None
    checkpoint = 4 * trained.total + optimizer_state_bytes(recipe.train.optimizer, trained.sizes, trained.embedding)
    # a new checkpoint is whole before the oldest goes
    return iterations * 4 * (num_weights if is_whole else trained.total) + (NUM_KEPT + 1) * checkpoint


def empty_model(folder: Path) -> PreTrainedModel:
    """The model without weights: shapes only."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(folder), trust_remote_code=False)
    return model


def trained_tensors(model: PreTrainedModel, adapter: Adapter | None) -> Trained:
    """Of a whole model, or of an adapter: r * in and r * out for every linear layer that it names, with DoRA out."""
    if adapter is None:
        sizes, embedding = trained_sizes(model)
        return Trained(tuple(sizes), embedding)
    head = model.get_output_embeddings()
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and is_target(name, adapter.target_modules)
    ]
    sizes = [size for layer in layers for size in (adapter.r * layer.in_features, adapter.r * layer.out_features)]
    return Trained((*sizes, *(layer.out_features for layer in layers if adapter.use_dora)))


def frozen_bytes(model: PreTrainedModel, bytes_each: int, in_4bit: bool) -> int:
    """Of a base beside its adapter. In 4 bits are the linear layers but the output head."""
    total = bytes_each * sum(p.numel() for p in model.parameters())
    if not in_4bit:
        return total
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return total - round(linear * (bytes_each - BYTES_PER_WEIGHT))


def is_target(name: str, wanted: str | tuple[str, ...]) -> bool:
    """peft's rule: a text is a regular expression for the whole name, names of a list are its last parts."""
    if wanted == "all-linear":
        return True
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)
