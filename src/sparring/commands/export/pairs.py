"""Exports each iteration as preference pairs: the real response is chosen, the opponent's is rejected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sparring.commands.export.model import check_output
from sparring.data.formats import example_of
from sparring.data.read import BadRow
from sparring.data.render import Renderer, is_text_template
from sparring.data.tables import TURNS, write_table
from sparring.errors import UserError
from sparring.model.load import load_tokenizer
from sparring.recipe.schema import Data
from sparring.recipe.yaml import dump
from sparring.run.examples import join, read_iteration
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit, is_committed
from sparring.run.results import Results
from sparring.stages.prepare import make_renderer
from sparring.types import Generation, Message, Rendered, TokenIds


def schema(turns: pa.DataType) -> pa.Schema:
    """The columns of pairs whose prompts and responses are of the type `turns`."""
    tools = {"tools": pa.string()} if turns == TURNS else {}  # JSON, as TRL reads it
    return pa.schema(
        {
            "id": pa.string(),
            "sample": pa.int16(),
            "prompt": turns,
            "chosen": turns,
            "rejected": turns,
            **tools,
            "chosen_finish": pa.string(),  # "length": truncated, so it has no end token
            "rejected_finish": pa.string(),
        }
    )


README = """---
{metadata}---

# Pairs of {name}

Real responses (`chosen`) and the opponent's (`rejected`), one split per iteration, in the columns that TRL's DPOTrainer
reads. {form}
A response whose `finish` is `length` was truncated. Drop those rows if the model must not learn to stop there.
{num_inexact} of {num_texts} texts give different tokens than the run's when they are tokenized again.
"""
TEXTS = """Texts are plain: prompts are rendered with the run's template, and the end token is left out because TRL adds
it."""
CHATS = """Prompts and responses are messages, which TRL renders with the chat template of its model. For the run's
tokens, use a model that `sparring export` made: it has the run's template."""


def export_pairs(results: Results, out: Path) -> int:
    """Writes iteration-NN.parquet for every generated iteration, and a card; returns the number of pairs."""
    check_output(out)
    generated = [t for t in range(results.recipe.iterations) if is_committed(results.run.stage(t, "generate"))]
    if results.data is None or not generated:
        raise UserError(f"--pairs: {results.run.root} has no generated responses yet.")
    run, recipe = results.run, results.recipe
    is_text = is_text_template(recipe.template)
    make = text_pair if is_text else chat_pair
    columns_of = schema(pa.string() if is_text else TURNS)
    tokenizer = load_tokenizer(Path(results.data.model))
    renderer = make_renderer(recipe, Path(results.data.model), tokenizer)
    num_pairs = num_inexact = 0
    with commit(
        out, input_digests=run.input_digests(run.data, *(run.stage(t, "generate") for t in generated))
    ) as folder:
        for t in generated:
            iteration = Iteration(run, recipe.at(t), t)
            columns: dict[str, list[object]] = {name: [] for name in columns_of.names}
            for joined in join(iteration.train_rows(), {t: read_iteration(iteration, t)}):
                row = joined.row
                for response in joined.generated[t]:
                    pair, inexact = make(renderer, recipe.data, row, response)
                    num_inexact += inexact
                    ends = {"chosen_finish": row.real_finish, "rejected_finish": response.finish}
                    for name, value in {"id": row.id, "sample": response.sample, **pair, **ends}.items():
                        columns[name].append(value)
            write_table(folder / f"iteration-{t:02d}.parquet", columns_of, columns)
            num_pairs += len(columns["id"])
        splits = [{"split": f"iteration_{t:02d}", "path": f"iteration-{t:02d}.parquet"} for t in generated]
        metadata = {"configs": [{"config_name": "default", "data_files": splits}], "tags": ["sparring", "preference"]}
        readme = README.format(
            metadata=dump(metadata),
            name=run.root.name,
            form=TEXTS if is_text else CHATS,
            num_inexact=num_inexact,
            num_texts=3 * num_pairs,
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return num_pairs


Pair = tuple[dict[str, object], int]
"""Columns of a pair, and how many of its three texts give other tokens than the run's."""


def text_pair(renderer: Renderer, settings: Data, row: Rendered, response: Generation) -> Pair:
    """Prompt and responses as texts, the prompt rendered."""
    prompt, chosen, rejected = (
        decode(renderer.tokenizer, row.prompt_ids, drop_bos=True),
        decode(renderer.tokenizer, without_end(row.real_ids, row.real_finish)),
        decode(renderer.tokenizer, without_end(response.token_ids, response.finish)),
    )
    pair: dict[str, object] = {"prompt": prompt[0], "chosen": chosen[0], "rejected": rejected[0]}
    return pair, sum(not is_exact for _, is_exact in (prompt, chosen, rejected))


def chat_pair(renderer: Renderer, settings: Data, row: Rendered, response: Generation) -> Pair:
    """Prompt and responses as messages. The user's own, unless the real response was truncated."""
    example = example_of(row, settings.columns, settings.split_on, settings.turns)
    *prompt, chosen = example.messages
    if row.real_finish == "length":
        chosen = answer_turn(renderer, row.real_ids, row.real_finish)
    rejected = answer_turn(renderer, response.token_ids, response.finish)
    inexact = 0
    for turn, ids in ((chosen, row.real_ids), (rejected, response.token_ids)):
        try:
            again = renderer(replace(example, messages=(*prompt, turn), rejected=None))
            pieces = ((again.prompt_ids, row.prompt_ids), (again.real_ids[: len(ids)], ids))
            inexact += not all(np.array_equal(*piece) for piece in pieces)
        except BadRow:
            inexact += 1
    columns = {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
    tools = json.dumps(example.tools) if example.tools else None
    return {**{name: [json.dumps(one) for one in turns] for name, turns in columns.items()}, "tools": tools}, inexact


def answer_turn(renderer: Renderer, ids: TokenIds, finish: str) -> Message:
    return Message(role="assistant", content=decode(renderer.tokenizer, without_end(ids, finish))[0])


def without_end(ids: TokenIds, finish: str) -> TokenIds:
    return ids[:-1] if finish == "stop" else ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: TokenIds, *, drop_bos: bool = False) -> tuple[str, bool]:
    """The text of token ids, and whether it tokenizes to the same ids again.

    `drop_bos` removes a BOS token that the tokenizer, and so a trainer that takes texts, adds to prompts itself.
    """
    tokens = ids.tolist()
    bos = cast(list[int], tokenizer("", add_special_tokens=True)["input_ids"])[:1] if drop_bos else []
    if bos and tokens[:1] == bos and bos == [tokenizer.bos_token_id]:
        tokens = tokens[1:]
    text = cast(str, tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return text, cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]) == tokens
