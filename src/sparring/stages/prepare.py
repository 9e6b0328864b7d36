"""The data stage: the user's rows, checked, rendered to token ids once, and split. Done once per run."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from sparring.data.formats import detect_shape, examples, prompt_key, renamed
from sparring.data.read import BadRow, read_rows
from sparring.data.render import Renderer
from sparring.data.tables import write_rows
from sparring.errors import Refused
from sparring.logging import track
from sparring.model.load import check_weights, context_length, declared_end_ids, load_tokenizer, resolve_model
from sparring.recipe.schema import Recipe
from sparring.run.iteration import DataSummary
from sparring.run.manifest import commit
from sparring.run.rundir import RunDir
from sparring.run.seeds import seed_of
from sparring.types import Example, Rendered


def prepare(run: RunDir, recipe: Recipe) -> DataSummary:
    """Writes data/: train.parquet, held_out.parquet, perhaps game.parquet, rejected.jsonl and summary.json."""
    model = resolve_model(recipe.model)
    tokenizer = load_tokenizer(model)
    renderer = make_renderer(recipe, model, tokenizer)
    intake = Intake(recipe, renderer)
    rows = intake.take(recipe.data.train, recipe.data.limit)
    train, held_out = apart(intake, rows, recipe.data.held_out, "held-out", recipe.seed)
    game: list[Keyed] = []
    if recipe.data.game_rows is not None:
        train, game = apart(intake, train, recipe.data.game_rows, "game-rows", recipe.seed, others=held_out)
        if not game:
            raise Refused(f"data.game_rows: {recipe.data.game_rows} leaves no row to play on")
    known = check_weights(model)
    every = [row for _, row in (*train, *game, *held_out)]
    largest = max(int(ids.max()) for row in every for ids in (row.prompt_ids, row.real_ids))
    if max(largest, renderer.end.id) >= known:
        raise Refused(
            f"model: the tokenizer in {model} gives token {max(largest, renderer.end.id)}, and the model has "
            f"embeddings for {known}: tokens 0 to {known - 1}. They do not belong together; "
            "use the model's own tokenizer"
        )
    summary = DataSummary(
        model=str(model),
        shape=intake.shape or "",
        num_train=len(train) + len(game),
        num_held_out=len(held_out),
        rejected=dict(intake.rejected),
        num_cut=sum(row.real_finish == "length" for row in every),
        end_token=str(tokenizer.convert_ids_to_tokens(renderer.end.id)),
        end_ids=tuple(sorted({renderer.end.id} | declared_end_ids(model, tokenizer))),
        template_digest=renderer.template_digest,
        max_length=renderer.max_length,
        mean_prompt_tokens=float(np.mean([len(row.prompt_ids) for _, row in (*train, *game)])),
        mean_real_tokens=float(np.mean([len(row.real_ids) for _, row in (*train, *game)])),
        num_game=len(game),
    )
    sources = [Path(source).resolve() for source in intake.sources if Path(source).exists()]
    with commit(run.data, reads=run.reads(model, *sources)) as folder:
        write_rows(folder / "train.parquet", [row for _, row in train])
        if game:
            write_rows(folder / "game.parquet", [row for _, row in game])
        write_rows(folder / "held_out.parquet", [row for _, row in held_out])
        (folder / "rejected.jsonl").write_text("".join(intake.log), encoding="utf-8")
        summary.write(folder / "summary.json")
    return summary


def make_renderer(recipe: Recipe, model: Path, tokenizer: PreTrainedTokenizerBase) -> Renderer:
    context = context_length(model)
    return Renderer(
        tokenizer,
        template=recipe.template,
        end_token=recipe.data.end_token,
        max_length=min(recipe.train.max_length, context or recipe.train.max_length),
        max_response=recipe.generate.max_new_tokens if recipe.data.cap_real else None,
    )


Keyed = tuple[str, Rendered]
"""A rendered row with the key of its prompt, which is never split between training and held-out data."""


class Intake:
    """Takes rows in, and keeps account of those that it cannot use."""

    def __init__(self, recipe: Recipe, renderer: Renderer) -> None:
        self.settings = recipe.data
        methods = recipe.methods()
        self.is_paired = any("rejected" in method.needs.roles for method in methods)
        if recipe.data.game_rows is not None and len({method.name == "sft" for method in methods}) < 2:
            raise Refused(
                "data.game_rows keeps rows from sft for a game, so it needs both, as in method: space, "
                "per_iteration: {0: {method: sft}}"
            )
        self.render = renderer
        self.seen: dict[str, int] = {}
        self.rejected: Counter[str] = Counter()
        self.log: list[str] = []
        self.sources: list[str] = []
        self.shape: str | None = None
        self.first: str | None = None

    def take(self, source: str, limit: int | None = None) -> list[Keyed]:
        self.sources.append(source)
        rejected_before = self.rejected.total()
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
                        raise BadRow("no 'rejected' answer to the same prompt, which dpo needs")
                    if found.id in self.seen:
                        raise BadRow(f"the same as row {self.seen[found.id]}")
                    rendered = self.render(found)
                    taken.append((prompt_key(found), rendered))
                    self.seen[found.id] = number
                    advance(1, len(rendered.prompt_ids) + len(rendered.real_ids))
                except BadRow as problem:
                    self.reject(source, number, str(problem))
                if limit is not None and len(taken) == limit:
                    break
        bad = self.rejected.total() - rejected_before
        if not taken:
            raise Refused(f"data: {source} has no usable row{f': {self.reasons()}' if number else ', it is empty'}")
        if bad > self.settings.max_rejected * (bad + len(taken)):
            raise Refused(
                f"data: {bad} of {bad + len(taken)} rows of {source} cannot be used: {self.reasons()}. "
                f"Mend them, or raise data.max_rejected ({self.settings.max_rejected:g}) to go on without them"
            )
        return taken

    def _examples(self, source: str) -> Iterator[tuple[int, Example | BadRow]]:
        shape = None
        for number, row in read_rows(source, self.settings.split):
            if isinstance(row, BadRow):
                yield number, row
                continue
            if shape is None:
                shape = detect_shape(row, self.settings.columns, self.settings.split_on, source)
                self.shape = self.shape or shape.name
            try:
                for example in examples(renamed(row, self.settings.columns), number, shape, self.settings.turns):
                    yield number, example
            except BadRow as problem:
                yield number, problem

    def reject(self, source: str, number: int, reason: str) -> None:
        self.first = self.first or f"row {number} of {source}: {reason}"
        self.rejected[re.sub(r"\d+", "N", reason)] += 1  # one kind of fault is counted as one
        self.log.append(json.dumps({"file": source, "row": number, "reason": reason}, ensure_ascii=False) + "\n")

    def reasons(self) -> str:
        more = self.rejected.total() - 1
        return f"{self.first}{f' (and {more} more)' if more > 0 else ''}"


def apart(
    intake: Intake, rows: list[Keyed], amount: float | str, what: str, seed: int, others: Sequence[Keyed] = ()
) -> tuple[list[Keyed], list[Keyed]]:
    """(the rest, the rows kept apart): some of `rows`, or those of a file whose prompts are in none of the rows."""
    if not isinstance(amount, str):
        return split(rows, amount, what, seed)
    elsewhere = {key: "training" for key, _ in rows} | {key: "held-out" for key, _ in others}
    kept: list[Keyed] = []
    for key, row in intake.take(amount):
        if key in elsewhere:
            intake.reject(amount, row.row, f"the prompt is also in the {elsewhere[key]} data")
        else:
            kept.append((key, row))
    return rows, kept


def split(rows: Sequence[Keyed], amount: float, what: str, seed: int) -> tuple[list[Keyed], list[Keyed]]:
    """Prompts kept apart by hash, so that adding a row moves few others. All rows of a prompt go together.

    `amount` is a share if it is a float, else a number of prompts.
    """
    prompts = sorted({key for key, _ in rows}, key=lambda key: seed_of(seed, what, key))
    count = round(amount * len(prompts)) if isinstance(amount, float) else amount
    if count >= len(prompts):
        raise Refused(f"data.{what.replace('-', '_')}: {amount} leaves none of {len(prompts)} prompts for training")
    chosen = set(prompts[:count])
    return [r for r in rows if r[0] not in chosen], [r for r in rows if r[0] in chosen]
