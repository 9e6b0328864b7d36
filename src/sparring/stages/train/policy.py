"""What is trained: the opponent's weights as a policy, its scorer and its optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from sparring.logging import info
from sparring.model.load import load_model
from sparring.model.logprobs import Scorer
from sparring.model.lora import train_adapter
from sparring.model.memory import checkpoint_activations
from sparring.model.optimizers import make_optimizer, require_bitsandbytes
from sparring.parallel import Parallel
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration


@dataclass
class Policy:
    """`forward` is the scorer as ranks wrap it: the same function of a packed batch."""

    model: PreTrainedModel
    scorer: Scorer
    forward: nn.Module
    optimizer: Optimizer
    micro_batch_tokens: int = 0


def load_policy(iteration: Iteration, parallel: Parallel) -> Policy:
    """Loads the opponent's weights and prepares them, or a low-rank adapter on them, for training."""
    recipe = iteration.recipe
    device, dtype = parallel.device, getattr(torch, recipe.weights_dtype)
    if parallel.is_sharded:
        # weights reach the device shard by shard. As they are stored, the ranks of a machine map them from one file; in
        # another dtype each rank would hold the whole model in memory of its own
        device, dtype = torch.device("cpu"), dtype if recipe.adapter is not None else "auto"
    model = load_model(iteration.opponent, dtype=dtype, device=device, in_4bit=recipe.in_4bit)
    require_bitsandbytes(recipe.train.optimizer, parallel.device)
    policy = make_policy(model, recipe, iteration.seed("adapter"), parallel, Scorer)
    if policy.scorer.why_padded:
        info(f"  Prompt sharing is off for this model: {policy.scorer.why_padded}.")
    return policy


def make_policy(
    model: PreTrainedModel,
    recipe: Recipe,
    seed: int,
    parallel: Parallel,
    make_scorer: Callable[[PreTrainedModel, torch.dtype], Scorer],
) -> Policy:
    """Prepares loaded weights, or a low-rank adapter on them, for training. `seed`: of a new adapter."""
    settings = recipe.train
    if recipe.adapter is not None:
        train_adapter(model, recipe.adapter.for_peft(), seed)
        model.eval()  # peft adds layers in training mode
    if settings.gradient_checkpointing:
        checkpoint_activations(model)
    scorer = make_scorer(model, getattr(torch, settings.dtype))
    optimizer = make_optimizer(settings.optimizer, model, settings.learning_rate, settings.weight_decay)
    blocks = sorted(model._no_split_modules or ())  # transformers' own list of the layers that shard as one unit
    forward, optimizer = parallel.prepare(scorer, blocks, optimizer)
    return Policy(model, scorer, forward, optimizer)
