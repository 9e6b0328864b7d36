"""Rows that a caller holds in memory, as files of the run directory: from there they are read like the user's own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping

import xxhash

from sparring.data.read import without_nulls
from sparring.errors import RunMismatch, UserError
from sparring.run.manifest import commit, read_manifest
from sparring.run.rundir import RunDir
from sparring.run.session import is_done

Rows = Iterable[object]
"""A list of dicts, a `datasets.Dataset`, or anything else that can be iterated more than once and gives rows."""


def file_of(run: RunDir, name: str, given: object) -> str:
    """The file where `keep_rows` keeps the rows of this name.

    Raises `UserError` for a mapping of splits, and for an iterator, which is empty after one pass.
    """
    if isinstance(given, Mapping):
        names = ", ".join(map(repr, list(given)[:4]))
        raise UserError(f"{name}: rows are a list, not a {type(given).__name__} of {names}. Pass one of these.")
    if not isinstance(given, Iterable) or isinstance(given, Iterator):
        raise UserError(
            f"{name}: a {type(given).__name__} is neither a path nor rows. Pass a list of dicts or a Dataset."
        )
    return str(run.rows / f"{name}.jsonl")


def keep_rows(run: RunDir, rows: Mapping[str, Rows]) -> None:
    """Writes the rows of each name to `run.rows`, unless they are there. Line n of a file is row n, from 1.

    Raises `RunMismatch` if the run was started from other rows, and `UserError` for a value that cannot be written.
    """
    if not rows:
        return
    digests: dict[str, str] = {}
    for name, given in rows.items():
        digest = xxhash.xxh3_128()
        for line in json_lines(name, given):
            digest.update(line)
        digests[f"{name}.jsonl"] = digest.hexdigest()
    if is_done(run, run.rows):
        kept = {name: file["xxh3"] for name, file in read_manifest(run.rows).files.items()}
        if kept == digests:
            return
        if run.has_begun:
            other = " and ".join(name.removesuffix(".jsonl") for name in digests if kept.get(name) != digests[name])
            raise RunMismatch(
                f"{other}: the rows differ from those in {run.rows}, from which the run was started. Use another run "
                "directory, or pass the same rows."
            )
        shutil.rmtree(run.rows)  # of an attempt that was refused
    with commit(run.rows) as folder:
        for name, given in rows.items():
            with (folder / f"{name}.jsonl").open("wb") as file:
                file.writelines(json_lines(name, given))


def json_lines(name: str, rows: Rows) -> Iterator[bytes]:
    is_arrow = type(rows).__module__.startswith("datasets.")
    for number, row in enumerate(rows, start=1):
        try:
            yield json.dumps(as_json(without_nulls(row) if is_arrow else row)).encode() + b"\n"
        except RecursionError as error:
            raise UserError(f"{name}: row {number} is nested too deeply, or contains itself.") from error


def as_json(value: object) -> object:
    """The value as JSON holds it: arrays as lists, numbers that are not finite as null, what JSON lacks as text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, str | int | None):
        return value
    to_list = getattr(value, "tolist", None)  # of NumPy's and torch's arrays and numbers
    return as_json(to_list()) if to_list is not None else str(value)
