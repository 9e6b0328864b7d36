"""`sparring doctor`: checks within seconds whether a recipe would run. Loads no weights and writes no file."""

from __future__ import annotations

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

from sparring.commands.forecast import (
    FITS,
    UNKNOWN_ARCHITECTURE,
    device_memory,
    forecast,
    local_ranks,
    memory_remedies,
    num_training,
    training_bytes,
)
from sparring.errors import UserError
from sparring.model.load import context_length, declared_end_ids, load_tokenizer, resolve_model
from sparring.model.memory import inference_micro_batch_tokens
from sparring.parallel import local_device
from sparring.recipe.schema import Recipe
from sparring.run.disk import format_bytes, free_bytes
from sparring.stages.prepare import (
    DataReader,
    Keyed,
    count_checked,
    dependency_checks,
    make_renderer,
    optional_packages,
)

MAX_ROWS = 2000
"""Rows to render. A sample this large describes the rest."""

MARKS = {"good": ("✓", "green"), "note": ("!", "yellow"), "bad": ("✗", "red")}
PACKAGES = ("sparring", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Finding:
    level: Literal["good", "note", "bad"]
    text: str


def examine(recipe: Recipe) -> Iterator[Finding]:
    """Yields findings in the order in which a run would hit them. Stops after a problem that hides the rest."""
    optional = [package for package in optional_packages(recipe) if find_spec(package)]
    versions = ", ".join(f"{package} {version(package)}" for package in (*PACKAGES, *optional))
    num_threads = torch.get_num_threads()
    yield Finding(
        "good",
        f"Environment: {recipe.generate.backend} on {local_device()}, {num_threads} "
        f"thread{'' if num_threads == 1 else 's'}; {versions}",
    )
    try:
        folder = resolve_model(recipe.model)
        tokenizer = load_tokenizer(folder)
        renderer = make_renderer(recipe, folder, tokenizer)
    except UserError as error:
        yield Finding("bad", str(error))
        return
    for check in dependency_checks(recipe):
        try:
            check()
        except UserError as error:
            yield Finding("bad", str(error))
    source = "a text" if renderer.text_template else "data.template" if renderer.chat_template else "the tokenizer's"
    yield Finding("good", f"Model: {folder}. Template: {source}")
    token = repr(tokenizer.convert_ids_to_tokens(renderer.end.id))
    origin = "from the template" if renderer.end.is_in_template else "added by sparring: the template has none"
    ends = sorted({renderer.end.id} | declared_end_ids(folder, tokenizer))
    names = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in ends)
    yield Finding("good", f"End token: {token} ({origin}). Generation stops at {names}")
    if (context := context_length(folder)) and context < recipe.train.max_length:
        yield Finding(
            "note",
            f"train.max_length is lowered to {context} tokens, the model's context length (with LongRoPE, its original "
            "context length)",
        )
    try:
        reader = DataReader(recipe, renderer)
        rows = reader.read(recipe.data.train, min(recipe.data.limit or MAX_ROWS, MAX_ROWS))
    except UserError as error:
        yield Finding("bad", str(error))
        return
    yield from examine_rows(recipe, reader, rows)
    for key, file in (("data.held_out", recipe.data.held_out), ("data.self_play_rows", recipe.data.self_play_rows)):
        if isinstance(file, str):
            try:
                sample = reader.read(file, 100)
                yield Finding("good", f"{key}: read {len(sample)} rows in the format {reader.format}")
                num_left = len(reader.without(rows, recipe.data.train, sample, key))
                if num_left < len(rows):
                    kind: Literal["note", "bad"] = "note" if num_left else "bad"
                    text = (
                        f"{len(rows) - num_left} training rows have a prompt that is also in {file}: they are left out"
                    )
                    yield Finding(kind, text)
            except UserError as error:
                yield Finding("bad", str(error))
    yield from examine_resources(recipe, folder, len(rows))


def examine_rows(recipe: Recipe, reader: DataReader, rows: Sequence[Keyed]) -> Iterator[Finding]:
    num_skipped = reader.skipped.total()
    more = " (there are more)" if len(rows) == MAX_ROWS else ""
    yield Finding("good", f"Data: {len(rows):,} usable rows in the format {reader.format}{more}")
    if num_skipped:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in reader.skipped.most_common(3))
        yield Finding("note", f"{num_skipped:,} rows cannot be used: {reasons}. First: {reader.first}")
    for what, count in reader.left_out.items():
        yield Finding("note", f"In {count:,} rows the template leaves out {what}")
    if recipe.evaluate.checker is not None:
        try:
            yield Finding("good", f"Checker: finds an answer in {count_checked(recipe, rows)} of them")
        except UserError as error:
            yield Finding("bad", str(error))
    prompts, responses = (
        np.array([len(ids) for ids in lists])
        for lists in zip(*((one.row.prompt_ids, one.row.real_ids) for one in rows), strict=True)
    )
    yield Finding("good", f"Tokens: prompts {quantiles(prompts)}; real responses {quantiles(responses)}")
    if num_truncated := sum(one.row.real_finish == "length" for one in rows):
        yield Finding(
            "note",
            f"{num_truncated / len(rows):.1%} of the real responses are truncated at generate.max_new_tokens "
            f"({recipe.generate.max_new_tokens}) or train.max_length and have no end token",
        )
    longest = int((prompts + responses).max())
    micro_batch_tokens = inference_micro_batch_tokens(recipe.train.micro_batch_tokens, local_device())
    if longest > micro_batch_tokens:
        yield Finding(
            "note",
            f"The longest row has {longest} tokens, more than train.micro_batch_tokens ({micro_batch_tokens}). It gets "
            "a micro-batch of its own",
        )
    generate, read = recipe.generate, recipe.method.needs
    if read.rounds and not read.accepted and (generate.temperature != 1 or generate.top_p != 1):
        yield Finding("note", "The methods are defined for true samples: set temperature: 1 and top_p: 1")


def examine_resources(recipe: Recipe, folder: Path, num_rows: int) -> Iterator[Finding]:
    is_sample = num_rows == MAX_ROWS
    num_known = recipe.data.limit if is_sample and recipe.data.limit else num_rows
    try:
        needs = forecast(recipe, folder, num_training(recipe, num_known))
    except UNKNOWN_ARCHITECTURE as error:
        yield Finding("note", f"Memory and disk cannot be forecast for this architecture: {error}")
        return
    trained = f", {needs.num_trained:,} of them trained" if needs.num_trained < needs.num_parameters else ""
    at_least = f"at least, from the first {MAX_ROWS:,} rows: " if is_sample and not recipe.data.limit else ""
    yield Finding(
        "good",
        f"{needs.num_parameters:,} parameters{trained}; {at_least}{needs.steps_per_iteration:,} optimizer steps per "
        f"iteration, {recipe.iterations} iterations",
    )
    yield examine_memory(recipe, folder, needs.state_bytes)
    free = free_bytes(Path.cwd())
    text = f"Disk: models and checkpoints need {format_bytes(needs.disk_bytes)}, {format_bytes(free)} free here"
    yield Finding("good" if needs.disk_bytes < free else "bad", text)


def examine_memory(recipe: Recipe, folder: Path, state_bytes: int) -> Finding:
    device, ranks = local_device().type, local_ranks(recipe)
    try:
        required = training_bytes(recipe, folder, device, ranks)
    except UNKNOWN_ARCHITECTURE as error:
        return Finding("note", f"Memory cannot be forecast for this architecture: {error}")
    available = device_memory(ranks)
    state = state_bytes / (ranks if recipe.is_sharded else 1)
    text = (
        f"Memory: training needs about {format_bytes(required)}{f' on each of {ranks} devices' if ranks > 1 else ''} "
        f"({format_bytes(state)} of it weights, gradients and optimizer state), {format_bytes(available)} available"
    )
    if required < FITS * available:
        return Finding("good", text)
    tokens = "max_length" if recipe.train.micro_batch_tokens == "auto" else "micro_batch_tokens"
    return Finding("bad", f"{text}. Lower train.{tokens}, or {memory_remedies(recipe, ranks)}")


def quantiles(lengths: np.ndarray) -> str:
    return f"{np.median(lengths):.0f} (median), {np.quantile(lengths, 0.95):.0f} (95%), {lengths.max()} (max)"


def print_findings(recipe: Recipe) -> bool:
    """Prints each finding as it is made; returns whether the recipe would run."""
    console, would_run = Console(), True
    for finding in examine(recipe):
        mark, color = MARKS[finding.level]
        console.print(Text.assemble((f"{mark} ", color), finding.text), soft_wrap=True)
        would_run = would_run and finding.level != "bad"
    console.print(Text("This recipe would run." if would_run else "This recipe would not run."))
    return would_run
