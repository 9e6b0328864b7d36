"""Which examples each optimizer step gets, and its learning rate. Both are functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from sparring.recipe.schema import Train

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """The steps of an iteration. The score stage reads the first epoch's, so that it cuts the same micro-batches."""

    settings: Train
    num_examples: int
    seed: Callable[..., int]  # Iteration.seed

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_examples / self.settings.batch_size)

    @property
    def num_steps(self) -> int:
        return self.settings.epochs * self.steps_per_epoch

    def batch(self, examples: Sequence[T], step: int) -> list[T]:
        epoch, place = divmod(step, self.steps_per_epoch)
        order = permutation(self.num_examples, self.seed("order", epoch))
        return [examples[i] for i in order[place * self.settings.batch_size : (place + 1) * self.settings.batch_size]]

    def first_epoch(self) -> list[list[int]]:
        """The indices of the examples of each step."""
        return [self.batch(range(self.num_examples), step) for step in range(self.steps_per_epoch)]

    def learning_rate(self, step: int) -> float:
        return learning_rate(step, self.num_steps, self.settings)


def permutation(count: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)


def learning_rate(step: int, num_steps: int, settings: Train) -> float:
    """The rate of optimizer step `step`, from 0. Rises over the warm-up, and no step has rate 0."""
    warmup = math.ceil(settings.warmup_ratio * num_steps)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    match settings.schedule:
        case "linear":
            return settings.learning_rate * (1 - progress)
        case "cosine":
            return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            return settings.learning_rate
