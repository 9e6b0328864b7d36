"""The generate stage and its engines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch

from sparring.errors import RunError
from sparring.logging import info
from sparring.model.load import load_model, num_parameters, save_dequantized
from sparring.model.lora import base_of
from sparring.model.memory import release_memory
from sparring.parallel import local_device
from sparring.recipe.schema import Generate
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit, is_committed, verify
from sparring.stages.generate.hf import BATCH_SIZE, HfBackend
from sparring.stages.generate.server import ServerBackend, started_server
from sparring.stages.generate.stage import draw_parts, generate, generate_parts, plan_parts, prepare_parts
from sparring.stages.generate.vllm import VllmBackend
from sparring.types import Backend, OpenBackend

__all__ = [
    "backend_factory",
    "draw_parts",
    "generate",
    "generate_parts",
    "open_backend",
    "plan_parts",
    "prepare_parts",
    "write_dequantized_base",
]


@contextmanager
def open_backend(
    model: Path,
    settings: Generate,
    dtype: str,
    end_ids: Sequence[int],
    max_length: int,
    in_4bit: bool = False,
    dequantized: Path | None = None,
) -> Iterator[Backend]:
    """The engine of a recipe, serving `model`. Leaving the context frees its memory.

    `in_4bit`: with the base quantized as in training; for vLLM, with `dequantized` in its place.
    """
    match settings.backend:
        case "hf":
            loaded = load_model(model, dtype=getattr(torch, dtype), device=local_device(), in_4bit=in_4bit)
            yield HfBackend(
                loaded,
                end_ids=end_ids,
                temperature=settings.temperature,
                top_p=settings.top_p,
                batch_size=settings.batch_size or BATCH_SIZE,
            )
            del loaded
        case "vllm":
            engine = VllmBackend(
                model,
                end_ids=end_ids,
                max_length=max_length,
                dtype=dtype,
                temperature=settings.temperature,
                top_p=settings.top_p,
                batch_size=settings.batch_size,
                python=settings.python,
                tensor_parallel_size=settings.tensor_parallel_size,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                base=dequantized,
            )
            with closing(engine):
                yield engine
        case "server":
            with server(model, settings, dtype) as (url, token):
                yield ServerBackend(
                    url,
                    model,
                    end_ids=end_ids,
                    token=token,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                    batch_size=settings.batch_size,
                )


def backend_factory(iteration: Iteration) -> OpenBackend:
    """Opens the engine of an iteration's recipe for a model's folder."""
    return partial(
        open_backend,
        settings=iteration.recipe.generate,
        dtype=iteration.recipe.train.dtype,
        end_ids=iteration.data.end_ids,
        max_length=iteration.data.max_length,
        in_4bit=iteration.recipe.in_4bit,
        dequantized=dequantized_base(iteration),
    )


def dequantized_base(iteration: Iteration) -> Path | None:
    """Where vLLM's copy of a base in 4 bits is. One copy serves all iterations: the base never changes."""
    recipe = iteration.recipe
    return iteration.run.root / "dequantized" if recipe.in_4bit and recipe.generate.backend == "vllm" else None


def write_dequantized_base(iteration: Iteration) -> None:
    """Writes vLLM's copy of a base in 4 bits, if it needs one that is not there. For the process that owns the run.

    vLLM's kernels for NF4 compute other numbers than bitsandbytes' do in training. The copy holds exactly the numbers
    that training computes with, in the compute dtype.
    """
    folder = dequantized_base(iteration)
    if folder is None:
        return
    if is_committed(folder):
        try:
            verify(folder)
            return
        except RunError as problem:
            info(f"  Writing the dequantized base again: {problem}")
            shutil.rmtree(folder)
    base, dtype = base_of(iteration.opponent), getattr(torch, iteration.recipe.train.dtype)
    with commit(folder, required_bytes=num_parameters(base) * dtype.itemsize) as temporary:
        save_dequantized(base, temporary, dtype=dtype, device=local_device())
    release_memory()


def server(model: Path, settings: Generate, dtype: str) -> AbstractContextManager[tuple[str, str | None]]:
    """(URL, token) of the user's server, or of one that is started for `model`."""
    if settings.command is not None:
        return started_server(settings.command, model, dtype)
    assert settings.url is not None
    return nullcontext((settings.url, os.environ.get("OPENAI_API_KEY")))
