"""Reads recipes, with messages that name file, line and remedy; writes and compares them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sparring.errors import UserError
from sparring.objectives import OBJECTIVES
from sparring.recipe import yaml
from sparring.recipe.schema import MAY_CHANGE, SECTIONS, Recipe

Overrides = Sequence[str] | Mapping[str, object]
"""Settings that replace those of a recipe: `key=value` as on the command line, or a mapping of dotted keys."""


def load_recipe(source: Recipe | str | Path | None, overrides: Overrides = ()) -> Recipe:
    """Applies overrides to a recipe or a recipe's file. None: the overrides are all there is."""
    raw: object
    lines: yaml.Lines = {}
    if isinstance(source, Recipe):
        if not overrides:
            return source
        raw, name = source.model_dump(by_alias=True, mode="json", exclude_unset=True), "recipe"
    elif source is not None:
        (raw, lines), name = yaml.read(Path(source)), str(source)
    else:
        raw, name = {}, "recipe"
    if not isinstance(raw, dict):
        raise UserError(f"{name}: a recipe is a mapping such as 'model: path', not a {type(raw).__name__}.")
    for key, value in parse_overrides(overrides).items():
        try:
            yaml.set_key(raw, key.split("."), value)
        except ValueError as error:
            raise UserError(f"override of {key}: {error}") from error
    return make_recipe(raw, lines, name)


def parse_overrides(overrides: Overrides) -> dict[str, object]:
    if isinstance(overrides, Mapping):
        return dict(overrides)
    values: dict[str, object] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"'{override}' is not an override. Write key=value, for example train.learning_rate=5e-7.")
        values[key], _ = yaml.parse(text, f"override '{override}'")
    return values


def make_recipe(raw: object, lines: yaml.Lines | None = None, source: str = "recipe") -> Recipe:
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        method = raw.get("method") if isinstance(raw, Mapping) else None
        method = method.get("name") if isinstance(method, Mapping) else method
        name = method if isinstance(method, str) else ""
        raise UserError("\n".join(f"{source}{line}" for line in _messages(error, lines or {}, name))) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every setting written out."""
    return yaml.dump(recipe.model_dump(by_alias=True, mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors. A method may be its name alone."""
    schema = Recipe.model_json_schema(by_alias=True)
    method = schema["properties"]["method"]
    schema["properties"]["method"] = {"anyOf": [{"enum": list(OBJECTIVES)}, method]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "sparring recipe"}


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Settings that change results and differ, one line each."""
    before, after = (flatten(recipe.model_dump(by_alias=True, mode="json")) for recipe in (old, new))
    return [
        f"{key} is {_value(after, key)}, but the run was started with {_value(before, key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and key not in _neutral_keys()
    ]


def flatten(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings under dotted keys, as overrides write them."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        is_section = isinstance(value, Mapping) and value
        found |= flatten(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}  # type: ignore[arg-type]
    return found


def _value(flat: Mapping[str, object], key: str) -> str:
    return repr(flat[key]) if key in flat else "not set"


def _neutral_keys() -> set[str]:
    found = {name for name, field in Recipe.model_fields.items() if field.json_schema_extra == MAY_CHANGE}
    for section, model in SECTIONS.items():
        found |= {
            f"{section}.{name}" for name, field in model.model_fields.items() if field.json_schema_extra == MAY_CHANGE
        }
    return found


def known_keys() -> list[str]:
    """Every dotted key of a recipe."""
    keys = set(Recipe.model_fields)
    for section in SECTIONS:
        keys.update(_section_keys(section, ""))
    for method in OBJECTIVES:
        keys.update(_section_keys("method", method))
    return sorted(keys)


def nearest_key(key: str, section_keys: Sequence[str], method: str) -> str | None:
    """The key that was probably meant: a similar one in the section, or the same name in another section.

    Of the coefficients, only those of `method`, the recipe's own.
    """
    name = key.rpartition(".")[2]
    inside = {k.rpartition(".")[2]: k for k in section_keys}
    anywhere: dict[str, str] = {}
    coefficients = _section_keys("method", method)
    for known in known_keys():
        if not known.startswith("method.") or known in coefficients:
            anywhere.setdefault(known.rpartition(".")[2], known)
    if name in anywhere and anywhere[name] != key:
        return anywhere[name]
    for table in (inside, anywhere):
        if close := get_close_matches(name, table, n=1, cutoff=0.6):
            return table[close[0]]
    return None


def _section_keys(section: str, method: str) -> list[str]:
    if not section:
        return list(Recipe.model_fields)
    if section == "method":
        names = OBJECTIVES[method].__dataclass_fields__ if method in OBJECTIVES else ()
        return [f"method.{name.rstrip('_')}" for name in names]
    return [f"{section}.{name}" for name in SECTIONS[section].model_fields] if section in SECTIONS else []


def _messages(error: ValidationError, lines: yaml.Lines, method: str) -> Iterator[str]:
    seen: set[str] = set()
    for problem in error.errors():
        where = [str(part) for part in problem["loc"]]
        if where[:1] == ["method"] and len(where) > 1:
            where.pop(1)  # pydantic's tag of the union member
        is_unknown = problem["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        known = known_keys()
        while where and not is_unknown and ".".join(where) not in known:
            where.pop()  # pydantic also lists the members of unions
        key = ".".join(where)
        line = f", line {lines[tuple(where)]}" if tuple(where) in lines else ""
        message = f"{line}: {_what(problem, key, method)}"
        if message not in seen:
            seen.add(message)
            yield message


def _what(problem: ErrorDetails, key: str, method: str) -> str:
    text = str(problem["msg"]).removeprefix("Value error, ")
    match problem["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            of = f" of {method}" if key.startswith("method.") else ""
            return f"there is no setting '{key}'{of}{_hint(key, method)}"
        case "missing":
            return f"'{key}' is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"method.name must be one of {', '.join(OBJECTIVES)}"
        case "value_error":
            return f"{key}: {text}" if key else text
        case _:
            return f"{key}: {text[0].lower()}{text[1:]}, not {problem['input']!r}"


def _hint(key: str, method: str) -> str:
    section, _, name = key.rpartition(".")
    others = [other for other in OBJECTIVES if f"method.{name}" in _section_keys("method", other)]
    if section == "method" and others:
        return f"; it belongs to {' and '.join(others)}"
    near = nearest_key(key, _section_keys(section, method), method)
    return f"; did you mean '{near}'?" if near else ""
