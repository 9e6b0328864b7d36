"""The generate stage and the engines that draw answers."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sparring import distributed
from sparring.config import Generate
from sparring.generate.hf import HfBackend
from sparring.generate.stage import generate
from sparring.model import load_model
from sparring.types import Backend

__all__ = ["generate", "open_backend"]


@contextmanager
def open_backend(model: Path, settings: Generate, dtype: torch.dtype, end_ids: Sequence[int]) -> Iterator[Backend]:
    """The engine that the recipe names, holding `model`; its memory is free again afterwards."""
    match settings.backend:
        case "hf":
            loaded = load_model(model, dtype=dtype, device=distributed.device())
            yield HfBackend(
                loaded,
                end_ids=end_ids,
                temperature=settings.temperature,
                top_p=settings.top_p,
                batch_size=settings.batch_size,
            )
            del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
