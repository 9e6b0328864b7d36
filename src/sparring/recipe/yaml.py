"""YAML as people mean it: no duplicate keys, `5e-7` is a number, `no` is a word, and every key has a line."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode

from sparring.errors import Refused

MAX_BYTES = 1_000_000

Lines = dict[tuple[str, ...], int]
"""Line number, from 1, of each key by its path."""


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2, no aliases and no duplicate keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's own way to configure a loader)
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":bool", ":float", ":timestamp"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise ComposerError(None, None, "aliases (*name) are not allowed here", event.start_mark)
        return super().compose_node(parent, index)

    def construct_scalar(self, node: Any) -> Any:
        """Halves of a character, as JSON writes those beyond 16 bits, become the character."""
        value = super().construct_scalar(node)
        if not isinstance(value, str) or value.isascii():
            return value
        try:
            return value.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError as error:
            raise ConstructorError(None, None, "half of a character (a lone surrogate)", node.start_mark) from error

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int):
                raise ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise ConstructorError(None, None, f"'{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?$"),
    list("-+.0123456789"),
)


def parse(text: str, source: str) -> tuple[object, Lines]:
    """The value of a YAML text and the lines of its keys; `source` names it in messages."""
    if len(text.encode("utf-8", errors="replace")) > MAX_BYTES:
        raise Refused(f"{source}: larger than {MAX_BYTES} bytes; a recipe is a small file")
    try:
        loader = Loader(text)
        try:
            node = loader.get_single_node()
            value = loader.construct_document(node) if node else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise Refused(f"{source}{f', line {mark.line + 1}' if mark else ''}: {problem}") from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        # PyYAML on "!!int" of nothing, and its like
        raise Refused(f"{source}: a value cannot be read: {error}") from error
    except RecursionError as error:
        raise Refused(f"{source}: nested too deeply") from error
    lines: Lines = {}
    _collect(node, (), lines)
    return value, lines


def read(path: Path) -> tuple[object, Lines]:
    try:
        return parse(path.read_text(encoding="utf-8-sig"), str(path))
    except FileNotFoundError as error:
        raise Refused(f"there is no file {path.absolute()}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{path} cannot be read: {error}") from error


def _collect(node: Node | None, path: tuple[str, ...], lines: Lines) -> None:
    if not isinstance(node, MappingNode):
        return
    for key, value in node.value:
        if isinstance(key, ScalarNode):
            lines[*path, str(key.value)] = key.start_mark.line + 1
            _collect(value, (*path, str(key.value)), lines)


def set_key(raw: dict[str, Any], path: Sequence[str], value: object) -> None:
    """Sets a dotted key in nested mappings, without changing the inner ones of the caller."""
    for depth, part in enumerate(path[:-1]):
        inner = raw.get(part)
        if path[: depth + 1] == ["method"] and isinstance(inner, str):
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ValueError(f"'{'.'.join(path)}' has no place, since {part} is not a mapping")
        raw[part] = dict(inner)
        raw = raw[part]
    raw[path[-1]] = value
