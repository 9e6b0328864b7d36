"""What a recipe will need: parameters, memory, disk, steps. From the model's config alone; nothing is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparring.model.kernels.chunked import BLOCK, KEPT
from sparring.model.load import load_config
from sparring.model.memory import activation_bytes
from sparring.model.quantization import BYTES_PER_WEIGHT
from sparring.recipe.optimizer_specs import moment_bytes
from sparring.recipe.schema import Adapter, Recipe
from sparring.stages.train.checkpoint import KEEP
from sparring.stages.train.optimizers import trained_sizes

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
    paged_bytes: int  # moments that may lie in the machine's memory, beside those
    work_bytes: int  # activations and the block of logits of a micro-batch: a rule of thumb
    disk_bytes: int  # at the most, at the end of the last training
    steps_per_iteration: int

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.work_bytes

    def state_on_each(self, parallel: str, devices: int) -> float:
        """Bytes of weights, gradients and moments on each device. DeepSpeed has a second copy of what is trained."""
        weights = 4 * self.num_trained
        match parallel:
            case "fsdp2":
                return self.state_bytes / devices
            case "zero2" if devices > 1:
                return self.frozen_bytes + weights + (self.state_bytes - self.frozen_bytes) / devices
            case "zero3" if devices > 1:
                return (self.state_bytes + weights) / devices
            case _:
                return self.state_bytes


def forecast(recipe: Recipe, folder: Path, num_rows: int) -> Forecast:
    """For `num_rows` training rows; SPIN's second round doubles the steps from iteration 1 on, which is counted."""
    model = empty_model(folder)
    train, adapter = recipe.train, recipe.adapter
    num_parameters = sum(p.numel() for p in model.parameters())
    trained = trained_tensors(model, adapter)
    frozen = 0 if adapter is None else frozen_bytes(model, BYTES[recipe.weights_dtype], recipe.in_4bit)
    moments, paged = moment_bytes(train.optimizer, trained.sizes, trained.embedding)
    config = model.config.get_text_config()
    per_token = activation_bytes(model.config, BYTES[train.dtype], checkpointing=train.gradient_checkpointing)
    asked = train.micro_batch_tokens
    tokens = train.max_length if asked == "auto" else asked  # which takes what there is; a row of that length must fit
    logits = 0 if train.gradient_checkpointing else KEPT
    rows = num_rows * (min(2, recipe.method.needs.rounds) if recipe.iterations > 1 else 1)
    return Forecast(
        num_parameters=num_parameters,
        num_trained=trained.total,
        frozen_bytes=frozen,
        state_bytes=frozen + trained.total * 4 * 2 + moments,
        paged_bytes=paged,
        work_bytes=tokens * per_token + logits + BLOCK * config.vocab_size * BYTES[train.dtype],
        disk_bytes=disk_bytes(recipe, num_parameters, trained, recipe.iterations),
        steps_per_iteration=train.epochs * math.ceil(max(rows, num_rows) / train.batch_size),
    )


def num_training(recipe: Recipe, num_rows: int) -> int:
    """Of the rows, those that are not held out; a row is taken for a prompt."""
    held_out = recipe.data.held_out
    if isinstance(held_out, str):
        return num_rows
    return max(1, num_rows - (round(held_out * num_rows) if isinstance(held_out, float) else held_out))


def disk_bytes(recipe: Recipe, num_parameters: int, trained: Trained, iterations: int) -> int:
    """What training keeps: a model or an adapter per iteration, in float32, and the checkpoints of one iteration."""
    is_whole = recipe.adapter is None or recipe.adapter.merge is not None
    checkpoint = 4 * trained.total + sum(moment_bytes(recipe.train.optimizer, trained.sizes, trained.embedding))
    # a new checkpoint is whole before the oldest goes
    return iterations * 4 * (num_parameters if is_whole else trained.total) + (KEEP + 1) * checkpoint


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
