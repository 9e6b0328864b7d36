"""Files and data sets as numbered rows. A row that cannot be read is reported in its place, not skipped."""

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


def read_rows(source: str, split: str = "train") -> Iterator[tuple[int, Row | BadRow]]:
    """(row number from 1, row or why it is none). For JSON lines the number is the line in the file."""
    path = Path(source)
    if path.is_dir():
        return _dataset(path, split)
    if not path.is_file():
        if path.suffix in READERS or source.startswith((".", "/", "~")) or source.count("/") != 1:
            raise UserError(f"data: there is no file {path.absolute()}; relative paths start at the working directory")
        return _hub(source, split)
    if path.suffix not in READERS:
        raise UserError(f"data: {path} ends in '{path.suffix}'; known are {', '.join(READERS)} and data set folders")
    try:
        return READERS[path.suffix](path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} cannot be read: {error}. Mend the file, or write it again") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    # bytes, not text lines: U+2028 and its like may stand inside a JSON string
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                try:
                    yield number, _mapping(_loads(line.decode("utf-8")))
                except (ValueError, RecursionError) as error:
                    yield number, BadRow(f"not JSON: {error}")
                except BadRow as problem:
                    yield number, problem


def _json(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    try:
        rows = _loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, BadRow) as error:
        raise UserError(f"data: {path} is not JSON: {error}. One object per line? Then name it .jsonl") from error
    if not isinstance(rows, list):
        raise UserError(f"data: {path} holds a {type(rows).__name__}; a list of rows is needed")
    return _numbered(rows)


def _parquet(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    return _numbered(_parquet_rows(path, pq.ParquetFile(path)))


def _parquet_rows(path: Path, file: pq.ParquetFile) -> Iterator[object]:
    number = 0
    try:
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"data: {path} cannot be read after row {number}: {error}") from error


def _csv(path: Path) -> Iterator[tuple[int, Row | BadRow]]:
    read = pyarrow.csv.ReadOptions(use_threads=False)  # else its complaints do not say which row
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return _numbered(pyarrow.csv.read_csv(path, read_options=read, parse_options=parse).to_pylist())


READERS = {".jsonl": _json_lines, ".json": _json, ".parquet": _parquet, ".csv": _csv}


def _dataset(folder: Path, split: str) -> Iterator[tuple[int, Row | BadRow]]:
    from datasets import DatasetDict, load_from_disk  # slow to import, and most data are files

    try:
        dataset = load_from_disk(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"data: {folder} is not a folder saved by datasets.save_to_disk: {error}") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise UserError(
                f"data: {folder} has the splits {', '.join(map(str, dataset))}, not '{split}'; set data.split"
            )
        dataset = dataset[split]
    return _numbered(dataset)


def _hub(name: str, split: str) -> Iterator[tuple[int, Row | BadRow]]:
    from datasets import load_dataset
    from huggingface_hub.errors import HfHubHTTPError

    repo, _, revision = name.partition("@")
    try:
        dataset = load_dataset(repo, split=split, revision=revision or None)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"data: there is no file {Path(name).absolute()}, and the hub did not give '{name}' ({split}): {error}"
        ) from error
    return _numbered(dataset)


def _numbered(rows: Iterable[object]) -> Iterator[tuple[int, Row | BadRow]]:
    for number, row in enumerate(rows, start=1):
        try:
            yield number, _mapping(row)
        except BadRow as problem:
            yield number, problem


def _loads(text: str) -> object:
    """JSON as its standard has it: no NaN, and no key twice, of which one value would be lost."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in pairs:
        if key in found:
            raise BadRow(f"{key!r} is given twice")
        found[key] = value
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON number")


def _mapping(row: object) -> Row:
    if not isinstance(row, dict):
        raise BadRow(f"a row is a mapping of columns, not a {type(row).__name__}")
    return row
