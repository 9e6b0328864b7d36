"""Self-play fine-tuning of language models: SPIN, T-SPIN and SPACE, end to end."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

# huge pages for torch's large tensors on CPU, where the system leaves the choice to programs: steps are faster. Set
# before torch is imported; child processes inherit it
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# in a notebook without ipywidgets, libraries that import tqdm would warn about progress bars that are never shown
warnings.filterwarnings("ignore", message="IProgress not found")

if TYPE_CHECKING:
    from sparring.commands.trainer import SelfPlayConfig, SelfPlayTrainer
    from sparring.commands.tune import tune
    from sparring.errors import RunError, RunMismatch, UserError
    from sparring.loop import play
    from sparring.objectives import OBJECTIVES
    from sparring.recipe.load import load_recipe
    from sparring.recipe.schema import Recipe
    from sparring.report.comparison import compare
    from sparring.run.results import Results

_HOMES = {
    "OBJECTIVES": "sparring.objectives",
    "Recipe": "sparring.recipe.schema",
    "Results": "sparring.run.results",
    "RunError": "sparring.errors",
    "RunMismatch": "sparring.errors",
    "SelfPlayConfig": "sparring.commands.trainer",
    "SelfPlayTrainer": "sparring.commands.trainer",
    "UserError": "sparring.errors",
    "compare": "sparring.report.comparison",
    "load_recipe": "sparring.recipe.load",
    "play": "sparring.loop",
    "tune": "sparring.commands.tune",
}

__all__ = [
    "OBJECTIVES",
    "Recipe",
    "Results",
    "RunError",
    "RunMismatch",
    "SelfPlayConfig",
    "SelfPlayTrainer",
    "UserError",
    "compare",
    "load_recipe",
    "play",
    "tune",
]


def __getattr__(name: str) -> object:
    """Imports on first use, so that `sparring --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sparring' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
