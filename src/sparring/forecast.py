"""What a recipe will need: parameters, memory, disk, steps. From the model's config alone; nothing is loaded."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparring.checkpoint import KEEP
from sparring.config import Adapter, Recipe
from sparring.kernels.chunked import BLOCK, KEPT
from sparring.model import load_config
from sparring.quantization import BYTES_PER_WEIGHT

BYTES = {"float32": 4, "bfloat16": 2}
MOMENTS = {"rmsprop": 1, "adamw": 2}


@dataclass(frozen=True)
class Forecast:
    num_parameters: int
    num_trained: int
    state_bytes: int  # weights, gradients, moments: exact
    work_bytes: int  # activations and the block of logits of a micro-batch: a rule of thumb
    disk_bytes: int  # at the most, at the end of the last training
    steps_per_iteration: int

    @property
    def memory_bytes(self) -> int:
        return self.state_bytes + self.work_bytes


def forecast(recipe: Recipe, folder: Path, num_rows: int) -> Forecast:
    """For `num_rows` training rows; SPIN's second round doubles the steps from iteration 1 on, which is counted."""
    model = empty_model(folder)
    train, adapter = recipe.train, recipe.adapter
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trained = num_parameters if adapter is None else adapter_size(model, adapter)
    frozen = 0 if adapter is None else frozen_bytes(model, BYTES[recipe.weights_dtype], recipe.in_4bit)
    moments = MOMENTS[train.optimizer]
    config = model.config.get_text_config()
    per_token = config.num_hidden_layers * config.hidden_size * BYTES[train.dtype]
    # 17 values per layer, token and width without checkpointing (Korthikanti et al. 2022: 34 bytes in 16 bits)
    activations = train.micro_batch_tokens * per_token * (1 if train.gradient_checkpointing else 17)
    rows = num_rows * (min(2, recipe.method.needs.rounds) if recipe.iterations > 1 else 1)
    return Forecast(
        num_parameters=num_parameters,
        num_trained=num_trained,
        state_bytes=frozen + num_trained * 4 * (2 + moments),
        work_bytes=activations + KEPT + BLOCK * config.vocab_size * BYTES[train.dtype],
        disk_bytes=disk_bytes(recipe, num_parameters, num_trained, recipe.iterations),
        steps_per_iteration=train.epochs * math.ceil(max(rows, num_rows) / train.batch_size),
    )


def num_training(recipe: Recipe, num_rows: int) -> int:
    """Of the rows, those that are not held out; a row is taken for a prompt."""
    held_out = recipe.data.held_out
    if isinstance(held_out, str):
        return num_rows
    return max(1, num_rows - (round(held_out * num_rows) if isinstance(held_out, float) else held_out))


def disk_bytes(recipe: Recipe, num_parameters: int, num_trained: int, iterations: int) -> int:
    """What training keeps: a model or an adapter per iteration, in float32, and the checkpoints of one iteration."""
    is_whole = recipe.adapter is None or recipe.adapter.merge is not None
    checkpoint = 4 * num_trained * (1 + MOMENTS[recipe.train.optimizer])
    # a new checkpoint is whole before the oldest goes
    return iterations * 4 * (num_parameters if is_whole else num_trained) + (KEEP + 1) * checkpoint


def empty_model(folder: Path) -> PreTrainedModel:
    """The model without weights: shapes only."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(folder), trust_remote_code=False)
    return model


def adapter_size(model: PreTrainedModel, adapter: Adapter) -> int:
    """Parameters of an adapter on the linear layers that it names: r * (in + out), and out more with DoRA."""
    head = model.get_output_embeddings()
    return sum(
        adapter.r * (module.in_features + module.out_features) + adapter.use_dora * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and is_target(name, adapter.target_modules)
    )


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
