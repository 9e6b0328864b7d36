"""How many tokens are computed at a time where a recipe says `micro_batch_tokens: auto`. It changes no mathematics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from transformers import PreTrainedConfig

from sparring.parallel.distributed import smaller_budget

START = {"cpu": 4096, "cuda": 16_384}
"""Tokens at a time of passes without gradients, and where training begins to look."""
CEILING = {"cpu": 4096, "cuda": 262_144}
"""Where it ends."""
LEAST = 512
CPU_ACTIVATIONS = 2**28
"""Bytes of activations, by the rule of thumb below, that a CPU's caches and pages still serve at full speed: more
tokens at a time take memory and gain nothing (benchmarks/budget.py)."""
VALUES = 17
"""Kept per layer, token and width for the backward pass (Korthikanti et al. 2022: 34 bytes in 16 bits)."""


def tokens_at_a_time(asked: int | Literal["auto"], device: torch.device) -> int:
    """Of passes without gradients."""
    return START.get(device.type, START["cpu"]) if asked == "auto" else asked


def activation_bytes(config: PreTrainedConfig, bytes_each: int, *, checkpointing: bool) -> int:
    """What a token keeps for the backward pass: a rule of thumb."""
    text = config.get_text_config()
    return text.num_hidden_layers * text.hidden_size * bytes_each * (1 if checkpointing else VALUES)


def where_to_look(device: torch.device, bytes_per_token: int) -> tuple[int, int]:
    """(start, ceiling) of the search. On a CPU nothing is tried: its memory does not say no before it is too late, and
    many tokens are slower than few."""
    if device.type != "cpu":
        return START.get(device.type, START["cpu"]), CEILING.get(device.type, CEILING["cpu"])
    budget = START["cpu"]
    while budget > LEAST and budget * bytes_per_token > CPU_ACTIVATIONS:
        budget //= 2
    return budget, budget


def find_budget(attempt: Callable[[int], object], start: int, ceiling: int, largest: int) -> int:
    """The largest of start, 2 start, 4 start, ... up to `ceiling` that memory holds; a half, a quarter, ... of `start`
    where it does not.

    `attempt` computes a fullest micro-batch of so many tokens. `largest`: tokens of the largest group, less than which
    cannot be computed.
    """
    budget, held = start, 0
    while True:
        try:
            attempt(budget)
        except RuntimeError as error:
            budget = smaller_budget(error, budget, largest)
            if held:
                return held
            ceiling = budget
            continue
        if 2 * budget > ceiling:
            return budget
        budget, held = 2 * budget, budget
