"""Reads data files and data sets as numbered rows. A row that cannot be read is reported in place, not skipped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sparring.errors import UserError

Row = Mapping[str, object]


class BadRow(Exception):
    """Why a row cannot be used."""


NumberedRows = Iterator[tuple[int, Row | BadRow]]


def read_rows(source: str, split: str = "train") -> NumberedRows:
    """Yields (row number from 1, row or why it cannot be used). For JSON lines the number is the line in the file."""
    path = Path(source)
    if path.is_dir():
        return _dataset_folder(path, split)
    if not path.is_file():
        if path.suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise UserError(f"data: {path.absolute()} does not exist. Relative paths start at the working directory.")
        return _hub_dataset(source, split)
    if path.suffix not in READERS:
        raise UserError(
            f"data: {path} has the unsupported suffix '{path.suffix}'. Use {', '.join(READERS)}, or a folder saved by "
            "datasets.save_to_disk."
        )
    try:
        return READERS[path.suffix](path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} cannot be read: {error}. Fix the file or write it again.") from error


def _json_lines(path: Path) -> NumberedRows:
    # bytes, not text lines: a JSON string may contain U+2028, at which Python would split the line
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                try:
                    yield number, _as_row(_parse_json(line.decode("utf-8")))
                except (ValueError, RecursionError) as error:
                    yield number, BadRow(f"not valid JSON: {error}")
                except BadRow as problem:
                    yield number, problem


def _json(path: Path) -> NumberedRows:
    try:
        rows = _parse_json(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, BadRow) as error:
        raise UserError(
            f"data: {path} is not valid JSON: {error}. If it has one object per line, rename it to .jsonl."
        ) from error
    if not isinstance(rows, list):
        raise UserError(f"data: {path} contains a {type(rows).__name__}. Write a list of rows.")
    return _numbered(rows)


def _parquet(path: Path) -> NumberedRows:
    return _numbered(_parquet_rows(path, pq.ParquetFile(path)))


def _parquet_rows(path: Path, file: pq.ParquetFile) -> Iterator[object]:
    number = 0
    try:
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield without_nulls(row)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} cannot be read after row {number}: {error}. Write the file again.") from error


def _csv(path: Path) -> NumberedRows:
    read = pyarrow.csv.ReadOptions(use_threads=False)  # with threads its errors lack the row number
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return _numbered(pyarrow.csv.read_csv(path, read_options=read, parse_options=parse).to_pylist())


READERS = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}


def _dataset_folder(folder: Path, split: str) -> NumberedRows:
    from datasets import DatasetDict, load_from_disk  # slow to import, and most users have files

    try:
        dataset = load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"data: {folder} is not a folder saved by datasets.save_to_disk: {error}") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(
                f"data: {folder} has no split '{split}'. Set data.split to one of {', '.join(map(str, dataset))}."
            )
        dataset = dataset[split]
    return _numbered(map(without_nulls, dataset))


def _hub_dataset(name: str, split: str) -> NumberedRows:
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    repo, _, revision = name.partition("@")
    try:
        dataset = load_dataset(repo, split=split, revision=revision or None)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"data: {Path(name).absolute()} does not exist, and loading split '{split}' of '{name}' from the Hub "
            f"failed: {error}"
        ) from error
    return _numbered(map(without_nulls, dataset))


def without_nulls(row: object) -> object:
    """Without the null fields inside columns: Arrow gives every object of a column the fields of all others."""
    return {name: _prune(value) for name, value in row.items()} if isinstance(row, dict) else row


def _prune(value: object) -> object:
    if isinstance(value, list):
        return [_prune(one) for one in value]
    if isinstance(value, dict):
        return {key: _prune(inner) for key, inner in value.items() if inner is not None}
    return value


def _numbered(rows: Iterable[object]) -> NumberedRows:
    for number, row in enumerate(rows, start=1):
        try:
            yield number, _as_row(row)
        except BadRow as problem:
            yield number, problem


def _parse_json(text: str) -> object:
    """Parses standard JSON: no NaN, and no duplicate keys, of which Python would drop all but the last."""
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_reject_constant)


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique: dict[str, object] = {}
    for key, value in pairs:
        if key in unique:
            raise BadRow(f"duplicate key {key!r}")
        unique[key] = value
    return unique


def _reject_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")


def _as_row(row: object) -> Row:
    if not isinstance(row, dict):
        raise BadRow(f"expected an object with columns, got {type(row).__name__}")
    return row
