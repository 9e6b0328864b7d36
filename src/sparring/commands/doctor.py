"""`sparring doctor`: would this recipe run? Within seconds, without loading a weight or writing a file."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from sparring.commands.forecast import forecast, num_training
from sparring.errors import UserError
from sparring.model.load import context_length, declared_end_ids, load_tokenizer, resolve_model
from sparring.model.memory import inference_micro_batch_tokens
from sparring.parallel import local_device, num_local_devices
from sparring.recipe.schema import Recipe
from sparring.stages.prepare import DataReader, Keyed, dependency_checks, make_renderer, optional_packages

MAX_ROWS = 2000
"""Rows that are rendered; a sample is enough to know the rest."""

MARKS = {"good": ("✓", "green"), "note": ("!", "yellow"), "bad": ("✗", "red")}
PACKAGES = ("sparring", "torch", "transformers", "peft")
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    level: Literal["good", "note", "bad"]
    text: str


def examine(recipe: Recipe) -> Iterator[Finding]:
    """Findings in the order in which a run would meet them. After a bad one that the rest rests on, it ends."""
    optional = [package for package in optional_packages(recipe) if find_spec(package)]
    versions = ", ".join(f"{package} {version(package)}" for package in (*PACKAGES, *optional))
    engine = f"{recipe.generate.backend} on {local_device()}"
    count = torch.get_num_threads()
    yield Finding("good", f"{engine}, {count} thread{'' if count == 1 else 's'}; {versions}")
    try:
        folder = resolve_model(recipe.model)
        tokenizer = load_tokenizer(folder)
        renderer = make_renderer(recipe, folder, tokenizer)
    except UserError as refusal:
        yield Finding("bad", str(refusal))
        return
    for check in dependency_checks(recipe):
        try:
            check()
        except UserError as refusal:
            yield Finding("bad", str(refusal))
    ends = sorted({renderer.end.id} | declared_end_ids(folder, tokenizer))
    where = "in the template" if renderer.end.is_in_template else "added by sparring, since the template has none"
    kind = "your text" if renderer.text_template else "your template" if renderer.chat_template else "the tokenizer's"
    yield Finding("good", f"model {folder}; template: {kind}")
    shown = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in ends)
    yield Finding(
        "good",
        f"answers end with {tokenizer.convert_ids_to_tokens(renderer.end.id)!r} ({where}); generation stops at {shown}",
    )
    if (context := context_length(folder)) and context < recipe.train.max_length:
        yield Finding("note", f"the model's context is {context} tokens, so train.max_length is that")

    try:
        reader = DataReader(recipe, renderer)
        rows = reader.read(recipe.data.train, min(recipe.data.limit or MAX_ROWS, MAX_ROWS))
    except UserError as refusal:
        yield Finding("bad", str(refusal))
        return
    yield from examine_rows(recipe, reader, rows)
    for what, file in (("held-out", recipe.data.held_out), ("game", recipe.data.self_play_rows)):
        if not isinstance(file, str):
            continue
        try:
            found = reader.read(file, 100)
            yield Finding("good", f"{what} file: rows of the form {reader.format}; {len(found)} looked at")
        except UserError as refusal:
            yield Finding("bad", str(refusal))
    yield from examine_needs(recipe, folder, len(rows))


def examine_rows(recipe: Recipe, reader: DataReader, rows: Sequence[Keyed]) -> Iterator[Finding]:
    skipped = reader.skipped.total()
    more = " (the first of more)" if len(rows) == MAX_ROWS else ""
    yield Finding("good", f"{len(rows):,} usable rows of the form {reader.format}{more}")
    if skipped:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in reader.skipped.most_common(3))
        yield Finding("note", f"{skipped:,} rows cannot be used: {reasons}. First: {reader.first}")
    prompts, answers = (
        np.array([len(ids) for ids in lists])
        for lists in zip(*((row.prompt_ids, row.real_ids) for _, row in rows), strict=True)
    )
    yield Finding("good", f"prompts {spread(prompts)}, real answers {spread(answers)} tokens (median, 95 %, longest)")
    if num_truncated := sum(row.real_finish == "length" for _, row in rows):
        yield Finding(
            "note",
            f"{num_truncated / len(rows):.1%} of the real answers are cut at generate.max_new_tokens "
            f"({recipe.generate.max_new_tokens}) or train.max_length and get no end token",
        )
    longest = int((prompts + answers).max())
    micro_batch_tokens = inference_micro_batch_tokens(recipe.train.micro_batch_tokens, local_device())
    if longest > micro_batch_tokens:
        yield Finding(
            "note",
            f"the longest row has {longest} tokens, more than train.micro_batch_tokens ({micro_batch_tokens}): it stands alone "
            "in its micro-batch",
        )
    generate = recipe.generate
    if recipe.method.needs.rounds and (generate.temperature != 1 or generate.top_p != 1):
        yield Finding("note", "the games are defined on true samples: temperature 1 and top_p 1")


def examine_needs(recipe: Recipe, folder: Path, num_rows: int) -> Iterator[Finding]:
    is_sample = num_rows == MAX_ROWS
    known = recipe.data.limit if is_sample and recipe.data.limit else num_rows
    try:
        needs = forecast(recipe, folder, num_training(recipe, known))
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        yield Finding("note", f"memory and disk cannot be forecast for this architecture: {error}")
        return
    trained = f", {needs.num_trained:,} of them trained" if needs.num_trained < needs.num_parameters else ""
    steps = f"{needs.steps_per_iteration:,} optimizer steps per iteration, {recipe.iterations} iterations"
    at_least = f"at least, from the first {MAX_ROWS:,} rows: " if is_sample and not recipe.data.limit else ""
    yield Finding("good", f"{needs.num_parameters:,} parameters{trained}; {at_least}{steps}")
    ranks = num_local_devices() if recipe.num_processes == "auto" else recipe.num_processes
    ranks = ranks if recipe.launch == "torchrun" else 1
    state = needs.state_on_each(recipe.parallel, ranks)
    disk = shutil.disk_usage(Path.cwd()).free
    memory = available_memory() / (1 if local_device().type == "cuda" else ranks)  # on a CPU ranks share it
    each = f"on each of {ranks} devices " if ranks > 1 else ""
    words = (
        f"training needs {each}about {(state + needs.work_bytes) / GIB:.2f} GiB: {state / GIB:.2f} for weights, "
        f"gradients and moments, and roughly {needs.work_bytes / GIB:.2f} for activations; there are {memory / GIB:.1f}"
    )
    share = ", parallel: fsdp2" if ranks > 1 and recipe.parallel == "ddp" else ""
    tokens = "max_length" if recipe.train.micro_batch_tokens == "auto" else "micro_batch_tokens"
    remedy = f"; lower train.{tokens}, set train.gradient_checkpointing{share}, or use an adapter"
    fits = state + needs.work_bytes < 0.95 * memory
    yield Finding("good" if fits else "bad", words + ("" if fits else remedy))
    words = f"models and checkpoints need {needs.disk_bytes / GIB:.2f} GiB of disk; {disk / GIB:.1f} are free here"
    yield Finding("good" if needs.disk_bytes < disk else "bad", words)


def spread(lengths: np.ndarray) -> str:
    return f"{np.median(lengths):.0f}, {np.percentile(lengths, 95):.0f}, {lengths.max()}"


def available_memory() -> int:
    """Bytes of the device that trains."""
    if local_device().type == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def print_findings(recipe: Recipe) -> bool:
    """Prints as it finds; returns whether the recipe would run."""
    console, would_run = Console(), True
    for finding in examine(recipe):
        mark, colour = MARKS[finding.level]
        console.print(Text.assemble((f"{mark} ", colour), finding.text), soft_wrap=True)
        would_run = would_run and finding.level != "bad"
    console.print(Text("this recipe would run" if would_run else "this recipe would not run"))
    return would_run
