"""The rounds of a run as preference data: the real answer is chosen, the opponent's is rejected."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sparring.commands.export.model import begin_export
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
        "chosen_finish": pa.string(),  # "length": cut, so that it has no end of its own
        "rejected_finish": pa.string(),
    }
)

README = """---
{metadata}---

# Pairs of {name}

Real answers (`chosen`) and the opponent's (`rejected`), one split per round of self-play: the columns that TRL's
DPOTrainer reads, as plain texts. Prompts are rendered with the run's template; the end token, which TRL adds, is left
out. Where a `finish` is `length` the answer was cut: leave such rows out if nothing may teach the model to stop there.
{num_inexact} of {num_texts} texts become other tokens than the run's when they are tokenized again.
"""


def export_pairs(results: Results, out: Path) -> int:
    """Writes iteration-NN.parquet for every round that was drawn, and a card; returns the number of pairs."""
    begin_export(out)
    drawn = [t for t in range(results.recipe.iterations) if is_committed(results.run.stage(t, "generate"))]
    if results.data is None or not drawn:
        raise UserError(f"--pairs: {results.run.root} has no generated answers yet")
    run = results.run
    tokenizer = load_tokenizer(Path(results.data.model))
    num_pairs = num_texts = num_inexact = 0
    with commit(out, input_digests=run.input_digests(run.data, *(run.stage(t, "generate") for t in drawn))) as folder:
        for t in drawn:
            iteration = Iteration(run, results.recipe.at(t), t)
            columns: dict[str, list[object]] = {name: [] for name in PAIRS.names}
            for one in join(iteration.train_rows(), {t: read_iteration(iteration, t)}):
                row = one.row
                for answer in one.generated[t]:
                    prompt, same = text_of(tokenizer, row.prompt_ids, has_start=True)
                    chosen, rejected = (
                        text_of(tokenizer, body(ids, finish))
                        for ids, finish in ((row.real_ids, row.real_finish), (answer.token_ids, answer.finish))
                    )
                    num_texts += 3
                    num_inexact += (not same) + (not chosen[1]) + (not rejected[1])
                    values = (row.id, answer.sample, prompt, chosen[0], rejected[0], row.real_finish, answer.finish)
                    for name, value in zip(PAIRS.names, values, strict=True):
                        columns[name].append(value)
            write_table(folder / f"iteration-{t:02d}.parquet", PAIRS, columns)
            num_pairs += len(columns["id"])
        splits = [{"split": f"iteration_{t:02d}", "path": f"iteration-{t:02d}.parquet"} for t in drawn]
        metadata = {"configs": [{"config_name": "default", "data_files": splits}], "tags": ["sparring", "preference"]}
        readme = README.format(
            metadata=dump(metadata),
            name=run.root.name,
            num_inexact=num_inexact,
            num_texts=num_texts,
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")
    return num_pairs


def body(ids: TokenIds, finish: str) -> TokenIds:
    return ids[:-1] if finish == "stop" else ids


def text_of(tokenizer: PreTrainedTokenizerBase, ids: TokenIds, *, has_start: bool = False) -> tuple[str, bool]:
    """The text of some tokens, and whether it becomes them again.

    A trainer that takes texts begins a prompt with the start token itself where the tokenizer does so.
    """
    tokens = ids.tolist()
    start = cast(list[int], tokenizer("", add_special_tokens=True)["input_ids"])[:1] if has_start else []
    if start and tokens[:1] == start and start == [tokenizer.bos_token_id]:
        tokens = tokens[1:]
    text = cast(str, tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return text, cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"]) == tokens
