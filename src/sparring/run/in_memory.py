"""What a caller of `play` holds in memory: rows, as files of the run directory from which they are read like the user's
own, and a tokenizer, as settings.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import xxhash
from transformers import PreTrainedTokenizerBase

from sparring.data.read import without_nulls
from sparring.errors import RunMismatch, UserError
from sparring.model.load import load_tokenizer
from sparring.recipe.schema import Data
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


def model_folder(model: object) -> str | None:
    """The model as a recipe names it. Raises `UserError` for a loaded one: its weights may not be those of a folder."""
    if model is None or isinstance(model, str | Path):
        return None if model is None else str(model)
    raise UserError(
        f"model: pass the folder or Hub id of the {type(model).__name__}, not the loaded model. If its weights "
        "were changed, save it first with save_pretrained."
    )


def tokenizer_settings(tokenizer: PreTrainedTokenizerBase, model: Path, data: Data) -> dict[str, object]:
    """The settings of a recipe that a loaded tokenizer changes: what it has unlike the model's own, and `data` has not.

    Raises `UserError` if its tokens are not those of the model's own tokenizer.
    """
    own = load_tokenizer(model)
    if tokenizer.get_vocab() != own.get_vocab():
        raise UserError(
            f"tokenizer: its tokens differ from those of the tokenizer in {model}. Save both in one folder with "
            "save_pretrained, and pass that folder as model."
        )
    changed: dict[str, object] = {}
    if data.template is None and tokenizer.chat_template != own.chat_template:
        changed["data.template"] = tokenizer.chat_template
    if data.end_token is None and tokenizer.eos_token != own.eos_token:
        changed["data.end_token"] = tokenizer.eos_token
    return changed


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
        changed = [name.removesuffix(".jsonl") for name in digests if kept.get(name) != digests[name]]
        if not changed:
            return
        if run.has_begun:
            raise RunMismatch(
                f"{' and '.join(changed)}: the rows differ from those in {run.rows}, from which the run was "
                "started. Use another run directory, or pass the same rows."
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
