"""Reads and writes Parquet tables with page checksums. Lists of token ids become NumPy arrays without a copy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from sparring.types import Candidates, Generation, Rendered

IDS = pa.list_(pa.int32())
TURNS = pa.list_(pa.json_())
"""Messages as texts of JSON, which datasets decodes. Each keeps the keys that it has, and gets no others as null."""

ROWS = pa.schema(
    {
        "id": pa.string(),
        "row": pa.int32(),
        "prompt_ids": IDS,
        "real_ids": IDS,
        "real_finish": pa.string(),
        "prompt": pa.string(),
        "real": pa.string(),
        "rejected_ids": IDS,
        "prompt_key": pa.string(),
        "source": pa.string(),
    }
)

GENERATIONS = pa.schema(
    {
        "id": pa.string(),
        "sample": pa.int16(),
        "token_ids": IDS,
        "finish": pa.string(),
        "logprob": pa.float32(),  # as the engine reports it, or null
        "text": pa.string(),
    }
)

SCORES = pa.schema(
    {"id": pa.string(), "role": pa.string(), "iteration": pa.int16(), "sample": pa.int16(), "logprob": pa.float32()}
)

CANDIDATES = pa.schema(
    {
        "id": pa.string(),
        "iteration": pa.int16(),
        "sample": pa.int16(),
        "candidates": IDS,  # token by token: the teacher's likeliest
        "logprobs": pa.list_(pa.float32()),  # token by token: the teacher's, of the token and of its candidates
    }
)
"""One row per generated response."""

OpponentScores = Mapping[tuple[str, str, int, int], float]
"""(row id, role, iteration, sample) -> log-prob. The iteration is the one that generated its rival, or 0."""


def write_table(path: Path, schema: pa.Schema, columns: Mapping[str, Sequence[object] | np.ndarray]) -> None:
    table = pa.table({name: _array(columns[name], schema.field(name).type) for name in schema.names}, schema=schema)
    pq.write_table(table, path, write_page_checksum=True)


def _array(values: Sequence[object] | np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(pa.string())).cast(kind) if kind == TURNS else pa.array(values, kind)


def read_table(path: Path) -> pa.Table:
    return pq.read_table(path, page_checksum_verification=True)


def id_lists(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The rows of a list column as views of one array."""
    lists = []
    for chunk in column.chunks:
        values = chunk.values.to_numpy()
        offsets = chunk.offsets.to_numpy()
        lists += [values[start:end] for start, end in pairwise(offsets)]
    return lists


def write_rows(path: Path, rows: Sequence[Rendered]) -> None:
    write_table(path, ROWS, {name: [getattr(row, name) for row in rows] for name in ROWS.names})


def read_rendered(path: Path) -> list[Rendered]:
    table = read_table(path)
    columns = [
        id_lists(table[name]) if table.schema.field(name).type == IDS else table[name].to_pylist()
        for name in ROWS.names
    ]
    return [Rendered(**dict(zip(ROWS.names, values, strict=True))) for values in zip(*columns, strict=True)]


def write_generations(path: Path, generations: Sequence[Generation], texts: Sequence[str]) -> None:
    columns: dict[str, Sequence[object]] = {
        name: [getattr(g, name) for g in generations] for name in GENERATIONS.names if name != "text"
    }
    write_table(path, GENERATIONS, {**columns, "text": texts})


def read_generations(paths: Iterable[Path]) -> list[Generation]:
    """Generations of several files, in the order of the files."""
    generations = []
    for path in paths:
        table = read_table(path)
        columns = (table["id"].to_pylist(), table["sample"].to_pylist(), id_lists(table["token_ids"]))
        generations += map(Generation, *columns, table["finish"].to_pylist(), table["logprob"].to_pylist())
    return generations


def read_scores(path: Path) -> OpponentScores:
    table = read_table(path)
    columns = [table[name].to_pylist() for name in ("id", "role", "iteration", "sample", "logprob")]
    return {(id, role, iteration, sample): value for id, role, iteration, sample, value in zip(*columns, strict=True)}


def read_candidates(path: Path) -> dict[tuple[str, int, int], tuple[Candidates, Float[np.ndarray, "tokens columns"]]]:
    """(row id, iteration, sample) -> the teacher's candidates, and its log-probs of each token and its candidates."""
    table = read_table(path)
    keys = zip(*(table[name].to_pylist() for name in ("id", "iteration", "sample")), strict=True)
    found = {}
    for key, candidates, logprobs in zip(keys, id_lists(table["candidates"]), id_lists(table["logprobs"]), strict=True):
        tokens = len(logprobs) - len(candidates)
        found[key] = candidates.reshape(tokens, -1), logprobs.reshape(tokens, -1)
    return found
