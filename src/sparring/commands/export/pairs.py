"""Exports each iteration as preference pairs: the real response is chosen, the opponent's is rejected."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sparring.commands.export.model import check_output
from sparring.data.tables import write_table
from sparring.errors import UserError
from sparring.model.load import load_tokenizer
from sparring.recipe.yaml import dump
from sparring.run.examples import join, read_iteration
from sparring.run.iteration import Iteration
from sparring.run.manifest import commit, is_committed
from sparring.run.results import Results
from sparring.types import TokenIds

PAIRS = pa.schema(
    {
        "id": pa.string(),
        "sample": pa.int16(),
        "prompt": pa.string(),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "chosen_finish": pa.string(),  # "length": truncated, so it has no end token
        "rejected_finish": pa.string(),
    }
)

README = """---
{metadata}---

# Pairs of {name}

Real responses (`chosen`) and the opponent's (`rejected`), one split per iteration, in the columns that TRL's DPOTrainer
reads. Texts are plain: prompts are rendered with the run's template, and the end token is left out because TRL adds it.
A response whose `finish` is `length` was truncated. Drop those rows if the model must not learn to stop there.
{num_inexact} of {num_texts} texts give different tokens than the run's when they are tokenized again.
"""


def export_pairs(results: Results, out: Path) -> int:
    """Writes iteration-NN.parquet for every generated iteration, and a card; returns the number of pairs."""
    check_output(out)
    generated = [t for t in range(results.recipe.iterations) if is_committed(results.run.stage(t, "generate"))]
    if results.data is None or not generated:
        raise UserError(f"--pairs: {results.run.root} has no generated responses yet.")
    run = results.run
    tokenizer = load_tokenizer(Path(results.data.model))
    num_pairs = num_texts = num_inexact = 0
    with commit(
        out, input_digests=run.input_digests(run.data, *(run.stage(t, "generate") for t in generated))
    ) as folder:
        for t in generated:
            iteration = Iteration(run, results.recipe.at(t), t)
            columns: dict[str, list[object]] = {name: [] for name in PAIRS.names}
            for joined in join(iteration.train_rows(), {t: read_iteration(iteration, t)}):
                row = joined.row
                for response in joined.generated[t]:
                    texts = (
                        decode(tokenizer, row.prompt_ids, drop_bos=True),
                        decode(tokenizer, without_end(row.real_ids, row.real_finish)),
                        decode(tokenizer, without_end(response.token_ids, response.finish)),
                    )
                    num_texts += len(texts)
                    num_inexact += sum(not is_exact for _, is_exact in texts)
                    prompt, chosen, rejected = (text for text, _ in texts)
                    values = (row.id, response.sample, prompt, chosen, rejected, row.real_finish, response.finish)
                    for name, value in zip(PAIRS.names, values, strict=True):
                        columns[name].append(value)
            write_table(folder / f"iteration-{t:02d}.parquet", PAIRS, columns)
            num_pairs += len(columns["id"])
        splits = [{"split": f"iteration_{t:02d}", "path": f"iteration-{t:02d}.parquet"} for t in generated]
        metadata = {"configs": [{"config_name": "default", "data_files": splits}], "tags": ["sparring", "preference"]}
        readme = README.format(
            metadata=dump(metadata),
            name=run.root.name,
            num_inexact=num_inexact,
            num_texts=num_texts,
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return num_pairs


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
