"""Self-play fine-tuning of language models: SPIN, T-SPIN and SPACE, end to end."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# large pages for torch's large tensors on CPU, where the system leaves the choice to programs: steps are shorter. Set
# before torch is imported, and for the processes that we start
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

if TYPE_CHECKING:
    from sparring.errors import RunError, RunMismatch, UserError
    from sparring.loop import play
    from sparring.objectives import OBJECTIVES
    from sparring.recipe.load import load_recipe
    from sparring.recipe.schema import Recipe
    from sparring.run.results import Results

__all__ = ["OBJECTIVES", "Recipe", "Results", "RunError", "RunMismatch", "UserError", "load_recipe", "play"]

_HOMES = {
    "OBJECTIVES": "sparring.objectives",
    "Recipe": "sparring.recipe.schema",
    "UserError": "sparring.errors",
    "Results": "sparring.run.results",
    "RunMismatch": "sparring.errors",
    "RunError": "sparring.errors",
    "load_recipe": "sparring.recipe.load",
    "play": "sparring.loop",
}


def __getattr__(name: str) -> object:
    """Imports on first use, so that `sparring --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparring' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
