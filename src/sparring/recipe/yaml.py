"""YAML 1.2 through ruamel.yaml: `5e-7` is a number, `no` is a word, no key is given twice, and every key has a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent
from ruamel.yaml.scalarfloat import ScalarFloat
from ruamel.yaml.scalarint import ScalarInt

from sparring.errors import UserError

MAX_BYTES = 1_000_000
MAX_DEPTH = 32

Lines = dict[tuple[str, ...], int]
"""Line number, from 1, of each key by its path."""


def parse(text: str, source: str) -> tuple[object, Lines]:
    """The value of a YAML text and the lines of its keys; `source` names it in messages."""
    if len(text.encode("utf-8", errors="replace")) > MAX_BYTES:
        raise UserError(f"{source}: larger than {MAX_BYTES} bytes; a recipe is a small file")
    depth = 0
    try:
        for event in YAML(typ="rt").parse(StringIO(text)):
            depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
            if depth > MAX_DEPTH:  # before the parser spends a minute on it
                raise UserError(f"{source}, line {event.start_mark.line + 1}: nested too deeply")
            is_merge = isinstance(event, ScalarEvent) and event.value == "<<" and event.style is None
            is_tagged = getattr(event, "tag", None) is not None
            if is_merge or is_tagged or isinstance(event, AliasEvent):
                line = event.start_mark.line + 1
                raise UserError(
                    f"{source}, line {line}: aliases (*name), merge keys (<<) and tags (!name) are not allowed in a "
                    "recipe."
                )
        loaded = YAML(typ="rt").load(text)
        lines: Lines = {}
        _collect_lines(loaded, (), lines, source)
        return _plain(loaded), lines
    except MarkedYAMLError as error:
        mark = error.problem_mark
        problem = str(error.problem or error).split("\n")[0]
        raise UserError(f"{source}{f', line {mark.line + 1}' if mark else ''}: {problem}") from error
    except (YAMLError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: a value cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def read(path: Path) -> tuple[object, Lines]:
    try:
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path.absolute()}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def dump(value: object) -> str:
    """As block YAML, keys in their order."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


def set_key(raw: dict[str, Any], path: Sequence[str], value: object) -> None:
    """Sets a dotted key in nested mappings, without changing the inner ones of the caller."""
    for depth, part in enumerate(path[:-1]):
        inner = raw.get(part)
        if path[: depth + 1] == ["method"] and isinstance(inner, str):
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ValueError(f"'{'.'.join(path)}' cannot be set, since {part} is not a mapping")
        raw[part] = dict(inner)
        raw = raw[part]
    raw[path[-1]] = value


def _collect_lines(value: object, path: tuple[str, ...], lines: Lines, source: str) -> None:
    if isinstance(value, CommentedMap):
        for key, inner in value.items():
            line = value.lc.key(key)[0] + 1
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise UserError(f"{source}, line {line}: a key must be a word, not {key!r}.")
            lines[*path, str(key)] = line
            _collect_lines(inner, (*path, str(key)), lines, source)


def _plain(value: Any) -> Any:
    """Plain Python values; halves of a character, as JSON writes those beyond 16 bits, become the character."""
    if isinstance(value, CommentedMap | Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, CommentedSeq | list):
        return [_plain(inner) for inner in value]
    if isinstance(value, ScalarFloat):
        return float(value)
    if isinstance(value, ScalarInt):
        return int(value)
    if isinstance(value, bool | int | float) or value is None:
        return value
    if isinstance(value, str):
        text = str(value)
        if text.isascii():
            return text
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise ValueError("half of a character (a lone surrogate)") from error
    if isinstance(value, date):
        return value.isoformat()  # dates have no meaning in a recipe
    raise ValueError(f"{type(value).__name__} values are not allowed in a recipe")
