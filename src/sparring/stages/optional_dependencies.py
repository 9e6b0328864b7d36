"""Libraries that only some recipes need: which ones, and whether they run here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from sparring.model.quantization import refuse_without_4bit
from sparring.parallel import distributed
from sparring.parallel.zero import refuse_without_deepspeed
from sparring.recipe.optimizer_specs import KINDS
from sparring.recipe.schema import Recipe
from sparring.stages.train.optimizers import refuse_without_bitsandbytes


def optional_packages(recipe: Recipe) -> list[str]:
    """Those that a run of the recipe computes with."""
    bitsandbytes = recipe.in_4bit or any(KINDS[name].ours for name in _optimizers(recipe))
    return ["bitsandbytes"] * bitsandbytes + ["deepspeed"] * recipe.zero


def checks(recipe: Recipe) -> Iterator[Callable[[], None]]:
    """Each raises `Refused` where this machine lacks something. Libraries are tried, not only looked for."""
    if recipe.in_4bit:
        yield partial(refuse_without_4bit, distributed.device())
    if recipe.zero:
        yield partial(refuse_without_deepspeed, recipe.parallel)
    if recipe.launch != "ray":  # there the devices are another machine's
        for name in _optimizers(recipe):
            yield partial(refuse_without_bitsandbytes, name, distributed.device())


def _optimizers(recipe: Recipe) -> list[str]:
    return sorted({recipe.at(index).train.optimizer for index in range(recipe.iterations)})
