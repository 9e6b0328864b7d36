"""The data stage: checks the user's rows, renders them to token ids, and splits them. Runs once per run directory."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from sparring.data.formats import detect_format, examples, prompt_key, rename_columns
from sparring.data.read import BadRow, read_rows
from sparring.data.render import Renderer
from sparring.data.tables import write_rows
from sparring.errors import UserError
from sparring.logging import track
from sparring.model.load import check_weights, context_length, declared_end_ids, load_tokenizer, resolve_model
from sparring.model.optimizers import require_bitsandbytes
from sparring.model.quantization import require_4bit
from sparring.parallel import local_device
from sparring.recipe.schema import Recipe
from sparring.run.iteration import DataSummary, seed_of
from sparring.run.manifest import commit
from sparring.run.rundir import RunDir
from sparring.types import Example, Rendered


def check_dependencies(recipe: Recipe) -> None:
    """Raises `UserError` if this machine lacks a library that the recipe needs, after trying the library."""
    for check in dependency_checks(recipe):
        check()


def dependency_checks(recipe: Recipe) -> Iterator[Callable[[], None]]:
    if recipe.in_4bit:
        yield partial(require_4bit, local_device())
    if recipe.launch != "ray":  # there the devices are on other machines
        for optimizer in sorted(_optimizers(recipe)):
            yield partial(require_bitsandbytes, optimizer, local_device())


def optional_packages(recipe: Recipe) -> list[str]:
    """Extras that a run of the recipe computes with, whose versions are recorded."""
    return ["bitsandbytes"] if recipe.in_4bit or "adamw_8bit" in _optimizers(recipe) else []


def _optimizers(recipe: Recipe) -> set[str]:
    return {recipe.at(index).train.optimizer for index in range(recipe.iterations)}


def prepare(run: RunDir, recipe: Recipe) -> DataSummary:
    """Writes data/: train.parquet, held_out.parquet, self_play.parquet if asked for, skipped.jsonl, summary.json."""
    model = resolve_model(recipe.model)
    tokenizer = load_tokenizer(model)
    renderer = make_renderer(recipe, model, tokenizer)
    reader = DataReader(recipe, renderer)
    rows = reader.read(recipe.data.train, recipe.data.limit)
    train, held_out = split_off(reader, rows, recipe.data.held_out, "held-out", recipe.seed)
    self_play: list[Keyed] = []
    if recipe.data.self_play_rows is not None:
        train, self_play = split_off(
            reader, train, recipe.data.self_play_rows, "self-play-rows", recipe.seed, others=held_out
        )
        if not self_play:
            raise UserError(f"data.self_play_rows: {recipe.data.self_play_rows} leaves no row for self-play.")
    known = check_weights(model)
    every = [row for _, row in (*train, *self_play, *held_out)]
    largest = max(int(ids.max()) for row in every for ids in (row.prompt_ids, row.real_ids))
    if max(largest, renderer.end.id) >= known:
        raise UserError(
            f"model: the tokenizer in {model} returns token {max(largest, renderer.end.id)}, but the model has "
            f"embeddings for tokens 0 to {known - 1}. Use the model's own tokenizer."
        )
    summary = DataSummary(
        model=str(model),
        format=reader.format or "",
        num_train=len(train) + len(self_play),
        num_held_out=len(held_out),
        skipped=dict(reader.skipped),
        num_truncated=sum(row.real_finish == "length" for row in every),
        end_token=str(tokenizer.convert_ids_to_tokens(renderer.end.id)),
        end_ids=tuple(sorted({renderer.end.id} | declared_end_ids(model, tokenizer))),
        template_digest=renderer.template_digest,
        max_length=renderer.max_length,
        mean_prompt_tokens=float(np.mean([len(row.prompt_ids) for _, row in (*train, *self_play)])),
        mean_real_tokens=float(np.mean([len(row.real_ids) for _, row in (*train, *self_play)])),
        num_self_play=len(self_play),
    )
    sources = [Path(source).resolve() for source in reader.sources if Path(source).exists()]
    with commit(run.data, input_digests=run.input_digests(model, *sources)) as folder:
        write_rows(folder / "train.parquet", [row for _, row in train])
        if self_play:
            write_rows(folder / "self_play.parquet", [row for _, row in self_play])
        write_rows(folder / "held_out.parquet", [row for _, row in held_out])
        (folder / "skipped.jsonl").write_text("".join(reader.log), encoding="utf-8")
        summary.write(folder / "summary.json")
    return summary


def make_renderer(recipe: Recipe, model: Path, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    context = context_length(model)
    return Renderer(
        tokenizer,
        template=recipe.template,
        end_token=recipe.data.end_token,
        max_length=min(recipe.train.max_length, context or recipe.train.max_length),
        max_response=recipe.generate.max_new_tokens if recipe.data.truncate_real else None,
    )


Keyed = tuple[str, Rendered]
"""(key of the prompt, row). A prompt is never split between training and held-out rows."""


class DataReader:
    """Reads and renders rows, and records those that cannot be used."""

    def __init__(self, recipe: Recipe, renderer: Renderer) -> None:
        self.settings = recipe.data
        methods = recipe.methods()
        self.is_paired = any("rejected" in method.needs.roles for method in methods)
        if recipe.data.self_play_rows is not None and len({method.name == "sft" for method in methods}) < 2:
            raise UserError(
                "data.self_play_rows hides rows from sft iterations, so the recipe needs both, such as method: space, "
                "per_iteration: {0: {method: sft}}."
            )
        self.render = renderer
        self.seen: dict[str, int] = {}
        self.skipped: Counter[str] = Counter()
        self.log: list[str] = []
        self.sources: list[str] = []
        self.format: str | None = None
        self.first: str | None = None

    def read(self, source: str, limit: int | None = None) -> list[Keyed]:
        self.sources.append(source)
        skipped_before = self.skipped.total()
        taken: list[Keyed] = []
        number = 0
        with track(f"read {Path(source).name}", limit) as advance:
            for number, found in self._examples(source):
                try:
                    if isinstance(found, BadRow):
                        raise found
                    if not self.is_paired:
                        found = replace(found, rejected=None)
                    elif found.rejected is None:
                        raise BadRow("no 'rejected' response to the same prompt, which dpo needs")
                    if found.id in self.seen:
                        raise BadRow(f"a duplicate of row {self.seen[found.id]}")
                    rendered = replace(self.render(found), prompt_key=prompt_key(found))
                    taken.append((rendered.prompt_key, rendered))
                    self.seen[found.id] = number
                    advance(1, len(rendered.prompt_ids) + len(rendered.real_ids))
                except BadRow as problem:
                    self.skip(source, number, str(problem))
                if limit is not None and len(taken) == limit:
                    break
        bad = self.skipped.total() - skipped_before
        if not taken:
            raise UserError(f"data: {source} has no usable row{f': {self.reasons()}' if number else ': it is empty'}")
        if bad > self.settings.max_skipped * (bad + len(taken)):
            raise UserError(
                f"data: {bad} of {bad + len(taken)} rows of {source} cannot be used: {self.reasons()}. "
                f"Fix them, or raise data.max_skipped ({self.settings.max_skipped:g}) to continue without them."
            )
        return taken

    def _examples(self, source: str) -> Iterator[tuple[int, Example | BadRow]]:
        row_format = None
        for number, row in read_rows(source, self.settings.split):
            if isinstance(row, BadRow):
                yield number, row
                continue
            if row_format is None:
                row_format = detect_format(row, self.settings.columns, self.settings.split_on, source)
                self.format = self.format or row_format.name
            try:
                for example in examples(
                    rename_columns(row, self.settings.columns), number, row_format, self.settings.turns
                ):
                    yield number, example
            except BadRow as problem:
                yield number, problem

    def skip(self, source: str, number: int, reason: str) -> None:
        self.first = self.first or f"row {number} of {source}: {reason}"
        self.skipped[re.sub(r"\d+", "N", reason)] += 1  # one reason for all row numbers
        self.log.append(json.dumps({"file": source, "row": number, "reason": reason}, ensure_ascii=False) + "\n")

    def reasons(self) -> str:
        more = self.skipped.total() - 1
        return f"{self.first}{f' (and {more} more)' if more > 0 else ''}"


def split_off(
    reader: DataReader, rows: list[Keyed], amount: float | str, what: str, seed: int, others: Sequence[Keyed] = ()
) -> tuple[list[Keyed], list[Keyed]]:
    """(remaining rows, split-off rows): some of `rows`, or those of a file that have other prompts."""
    if not isinstance(amount, str):
        return split(rows, amount, what, seed)
    elsewhere = {key: "training" for key, _ in rows} | {key: "held-out" for key, _ in others}
    kept: list[Keyed] = []
    for key, row in reader.read(amount):
        if key in elsewhere:
            reader.skip(amount, row.row, f"its prompt is also in the {elsewhere[key]} data")
        else:
            kept.append((key, row))
    return rows, kept


def split(rows: Sequence[Keyed], amount: float, what: str, seed: int) -> tuple[list[Keyed], list[Keyed]]:
    """Splits prompts by hash, so that adding a row moves few others. All rows of a prompt stay together.

    `amount` is a fraction if it is a float, otherwise a number of prompts.
    """
    prompts = sorted({key for key, _ in rows}, key=lambda key: seed_of(seed, what, key))
    count = round(amount * len(prompts)) if isinstance(amount, float) else amount
    if count >= len(prompts):
        raise UserError(f"data.{what.replace('-', '_')}: {amount} leaves none of {len(prompts)} prompts for training.")
    chosen = set(prompts[:count])
    return [r for r in rows if r[0] not in chosen], [r for r in rows if r[0] in chosen]
