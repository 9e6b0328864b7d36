"""The data stage: checks the user's rows, renders them to token ids, and splits them. Runs once per run directory."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from sparring.data.checkers import make_check, source_files
from sparring.data.formats import detect_format, exact_prompt_key, examples, prompt_key, rename_columns
from sparring.data.read import BadRow, read_rows
from sparring.data.render import Renderer
from sparring.data.tables import write_rows
from sparring.data.teacher import teacher_prompt_ids
from sparring.errors import UserError
from sparring.logging import track
from sparring.model.load import check_weights, context_length, declared_end_ids, load_tokenizer, resolve_model
from sparring.model.optimizers import require_bitsandbytes
from sparring.model.quantization import require_4bit
from sparring.parallel import local_device
from sparring.recipe.schema import JsonSchema, Recipe
from sparring.run.iteration import DataSummary, seed_of
from sparring.run.manifest import commit
from sparring.run.rundir import RunDir
from sparring.types import Example, Objective, Rendered


def check_dependencies(recipe: Recipe) -> None:
    """Raises `UserError` if this machine lacks a library that the recipe needs, after trying the library."""
    for check in dependency_checks(recipe):
        check()


def dependency_checks(recipe: Recipe) -> Iterator[Callable[[], object]]:
    if recipe.in_4bit:
        yield partial(require_4bit, local_device())
    if recipe.launch != "ray":  # there the devices are on other machines
        for optimizer in sorted(_optimizers(recipe)):
            yield partial(require_bitsandbytes, optimizer, local_device())
    if recipe.evaluate.checker is not None:
        yield partial(make_check, recipe.evaluate.checker)


def optional_packages(recipe: Recipe) -> list[str]:
    """Extras that a run of the recipe computes with, whose versions are recorded."""
    quantizes = recipe.in_4bit or "adamw_8bit" in _optimizers(recipe)
    checker = recipe.evaluate.checker
    checks_with = "math-verify" if checker == "math" else "jsonschema" if isinstance(checker, JsonSchema) else None
    return [*(["bitsandbytes"] if quantizes else []), *([checks_with] if checks_with else [])]


def _optimizers(recipe: Recipe) -> set[str]:
    return {recipe.at(index).train.optimizer for index in range(recipe.iterations)}


def prepare(run: RunDir, recipe: Recipe, others: Sequence[Objective] = ()) -> DataSummary:
    """Writes data/: train.parquet, held_out.parquet, self_play.parquet if asked for, skipped.jsonl, summary.json.

    `others`: methods beside the recipe's that are to train on the same rows.
    """
    model = resolve_model(recipe.model)
    tokenizer = load_tokenizer(model)
    renderer = make_renderer(recipe, model, tokenizer)
    reader = DataReader(recipe, renderer, others)
    train, self_play, held_out = read_and_split(reader, recipe)
    num_checked = count_checked(recipe, held_out)
    known = check_weights(model)
    every = [one.row for one in (*train, *self_play, *held_out)]
    training = [one.row for one in (*train, *self_play)]
    largest = max(int(ids.max()) for row in every for ids in (row.prompt_ids, row.real_ids))
    if max(largest, renderer.end.id) >= known:
        raise UserError(
            f"model: the tokenizer in {model} returns token {max(largest, renderer.end.id)}, but the model has "
            f"embeddings for tokens 0 to {known - 1}. Use the model's own tokenizer."
        )
    summary = DataSummary(
        model=str(model),
        format=reader.format or "",
        num_train=len(training),
        num_held_out=len(held_out),
        skipped=dict(reader.skipped),
        num_truncated=sum(row.real_finish == "length" for row in every),
        end_token=str(tokenizer.convert_ids_to_tokens(renderer.end.id)),
        end_ids=tuple(sorted({renderer.end.id} | declared_end_ids(model, tokenizer))),
        template_digest=renderer.template_digest,
        max_length=renderer.max_length,
        mean_prompt_tokens=float(np.mean([len(row.prompt_ids) for row in training])),
        mean_real_tokens=float(np.mean([len(row.real_ids) for row in training])),
        num_self_play=len(self_play),
        num_near_duplicates=num_near_duplicates([*train, *self_play, *held_out]),
        left_out=dict(reader.left_out),
        num_checked=num_checked,
    )
    sources = [Path(source).resolve() for source in reader.sources if Path(source).exists()]
    sources += source_files(recipe.evaluate.checker)
    with commit(run.data, input_digests=run.input_digests(model, *sources)) as folder:
        write_rows(folder / "train.parquet", [one.row for one in train])
        if self_play:
            write_rows(folder / "self_play.parquet", [one.row for one in self_play])
        write_rows(folder / "held_out.parquet", [one.row for one in held_out])
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
        declared_ends=declared_end_ids(model, tokenizer),
        empty_thought=recipe.data.empty_thought,
    )


def count_checked(recipe: Recipe, held_out: Sequence[Keyed]) -> int:
    """How many held-out rows evaluate.checker can check. Raises `UserError` if it fails on a real response, or calls
    none right."""
    checker = recipe.evaluate.checker
    if checker is None or not held_out:
        return 0
    check, results = make_check(checker), list[float | None]()
    for one in held_out:
        try:
            results.append(check(one.row.real, one.row))
        except Exception as error:
            raise UserError(
                f"evaluate.checker: {str(checker)[:80]} fails on the real response of row {one.row.row}: "
                f"{type(error).__name__}: {error}. Fix it, or choose another checker."
            ) from error
    if not any(results):
        row, name = held_out[0].row, str(checker)[:80]  # a schema is long
        raise UserError(
            f"evaluate.checker: {name} finds no right answer in any of {len(held_out)} held-out rows. "
            f"The response of row {row.row} ends with {row.real[-60:]!r}. Choose another checker, or remove it."
        )
    return sum(result is not None for result in results)


ON_ANOTHER_SIDE = "the prompt is also in the"
"""Beginning of the reason for rows that are left out because another side of the split has their prompts."""


class Keyed(NamedTuple):
    """A row with hashes of its prompt: normalized, and as it is written.

    Rows with one key are never split between training and held-out rows.
    """

    key: str
    exact: str
    row: Rendered


class DataReader:
    """Reads and renders rows, and records those that cannot be used."""

    def __init__(self, recipe: Recipe, renderer: Renderer, others: Sequence[Objective] = ()) -> None:
        self.settings = recipe.data
        methods = [*recipe.methods(), *others]
        self.is_paired = any("rejected" in method.needs.roles for method in methods)
        if recipe.data.self_play_rows is not None and len({method.name == "sft" for method in recipe.methods()}) < 2:
            raise UserError(
                "data.self_play_rows hides rows from sft iterations, so the recipe needs both, such as method: space, "
                "per_iteration: {0: {method: sft}}."
            )
        self.teachers = {method.needs.teacher for method in methods if method.needs.teacher}
        self.context = context_length(resolve_model(recipe.model)) if self.teachers else None
        self.max_new_tokens = recipe.generate.max_new_tokens
        self.render = renderer
        self.skipped: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.log: list[str] = []
        self.sources: list[str] = []
        self.format: str | None = None
        self.first: str | None = None  # of the skipped rows

    def read(self, source: str, limit: int | None = None) -> list[Keyed]:
        self.sources.append(source)
        skipped: list[str] = []
        taken: list[Keyed] = []
        seen: dict[str, int] = {}
        number = 0
        with track(f"read {Path(source).name}", limit) as advance:
            for number, found in self._examples(source):
                try:
                    if isinstance(found, BadRow):
                        raise found
                    if found.id in seen:
                        raise BadRow(f"a duplicate of row {seen[found.id]}")
                    source_text = json.dumps(found.source, default=str)
                    rendered = replace(self._render(found), prompt_key=prompt_key(found), source=source_text)
                    taken.append(Keyed(rendered.prompt_key, exact_prompt_key(found), rendered))
                    seen[found.id] = number
                    self.left_out.update(rendered.left_out)
                    advance(1, len(rendered.prompt_ids) + len(rendered.real_ids))
                except BadRow as problem:
                    self.skip(source, number, str(problem))
                    skipped.append(f"row {number} of {source}: {problem}")
                if limit is not None and len(taken) == limit:
                    break
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        if not taken:
            raise UserError(f"data: {source} has no usable row: {f'{skipped[0]}{more}' if skipped else 'it is empty'}")
        num_read = len(skipped) + len(taken)
        if len(skipped) > self.settings.max_skipped * num_read:
            raise UserError(
                f"data: {len(skipped)} of {num_read} rows of {source} cannot be used: {skipped[0]}{more}. "
                f"Fix them, or raise data.max_skipped ({self.settings.max_skipped:g}) to continue without them."
            )
        return taken

    def without(self, rows: Sequence[Keyed], source: str, others: Sequence[Keyed], where: str) -> list[Keyed]:
        """The rows of `source` whose prompts are not among those of `others`; the rest is listed as skipped."""
        keys, exact = {one.key for one in others}, {one.exact for one in others}
        for one in rows:
            if one.key in keys:
                but = "" if one.exact in exact else " but for case, white space, Unicode form or system prompt"
                self.skip(source, one.row.row, f"{ON_ANOTHER_SIDE} {where} data{but}")
        return [one for one in rows if one.key not in keys]

    def _render(self, example: Example) -> Rendered:
        if not self.is_paired:
            example = replace(example, rejected=None)
        elif example.rejected is None:
            raise BadRow("no 'rejected' response to the same prompt, which dpo needs")
        rendered = self.render(example)
        room = min(self.max_new_tokens, self.render.max_length - len(rendered.prompt_ids))
        for teacher in self.teachers:
            teacher_prompt_ids(self.render, teacher, example, rendered.real, room, self.context)
        return rendered

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
                    yield number, replace(example, source=row)
            except BadRow as problem:
                yield number, problem

    def skip(self, source: str, number: int, reason: str) -> None:
        self.first = self.first or f"row {number} of {source}: {reason}"
        self.skipped[re.sub(r"\d+", "N", reason)] += 1  # one reason for all row numbers
        self.log.append(json.dumps({"file": source, "row": number, "reason": reason}, ensure_ascii=False) + "\n")


def read_and_split(reader: DataReader, recipe: Recipe) -> tuple[list[Keyed], list[Keyed], list[Keyed]]:
    """(training, self-play, held-out rows).

    A prompt is on one side only. A separate file keeps its prompts: the same ones are left out of the training rows,
    and held-out ones of the self-play rows too. Raises `UserError` if nothing is left where the recipe asks for rows.
    """
    data = recipe.data
    train, self_play = reader.read(data.train, data.limit), list[Keyed]()
    if isinstance(data.held_out, str):
        held_out = reader.read(data.held_out)
        train = reader.without(train, data.train, held_out, "held-out")
    else:
        train, held_out = split(train, data.held_out, "held-out", recipe.seed)
    if data.held_out and not held_out:
        raise UserError(
            f"data.held_out: {data.held_out} of {num_prompts(train)} prompts rounds to 0. Set a number of them, or 0."
        )
    if isinstance(data.self_play_rows, str):
        self_play = reader.without(reader.read(data.self_play_rows), data.self_play_rows, held_out, "held-out")
        train = reader.without(train, data.train, self_play, "self-play")
    elif data.self_play_rows is not None:
        train, self_play = split(train, data.self_play_rows, "self-play-rows", recipe.seed)
    if data.self_play_rows is not None and not self_play:
        raise UserError(f"data.self_play_rows: {data.self_play_rows} leaves no row for self-play.")
    if not train:
        raise UserError(
            f"data.train: every prompt of {data.train} is also in data.held_out or data.self_play_rows. Separate files "
            "must have other prompts."
        )
    return train, self_play, held_out


def split(rows: Sequence[Keyed], amount: float, what: str, seed: int) -> tuple[list[Keyed], list[Keyed]]:
    """Splits prompts by hash, so that adding a row moves few others. All rows of a prompt stay together.

    `amount` is a fraction if it is a float, otherwise a number of prompts.
    """
    prompts = sorted({one.key for one in rows}, key=lambda key: seed_of(seed, what, key))
    count = round(amount * len(prompts)) if isinstance(amount, float) else amount
    if count >= len(prompts):
        raise UserError(f"data.{what.replace('-', '_')}: {amount} leaves none of {len(prompts)} prompts for training.")
    chosen = set(prompts[:count])
    return [one for one in rows if one.key not in chosen], [one for one in rows if one.key in chosen]


def num_prompts(rows: Sequence[Keyed]) -> int:
    return len({one.key for one in rows})


def num_near_duplicates(rows: Sequence[Keyed]) -> int:
    """Prompts that differ from another one only in what the key leaves out, and went where that one went."""
    return len({(one.key, one.exact) for one in rows}) - num_prompts(rows)
