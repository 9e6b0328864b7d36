"""Checkers: whether a response is right."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from inspect import getsourcefile, isfunction, unwrap
from numbers import Real
from pathlib import Path
from typing import Any

from sparring.data.bounded import BoundedProcess, CallFailed, LimitExceeded
from sparring.errors import UserError
from sparring.logging import info
from sparring.recipe.schema import Checker, Function, JsonSchema, Regex
from sparring.types import Rendered

Check = Callable[[str, Rendered], float | None]
"""(response, row) -> 0 (wrong) to 1 (right); None if the row has nothing to compare with."""
Extract = Callable[[str], str | None]
"""Extracts the comparable answer of a response; None if it has none."""

AFTER_MARK = re.compile(r"####\s*([^\n]*)")
NUMBER = re.compile(r"(-?)\s*[$€£¥]?\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))


def make_check(checker: Checker) -> Check:
    """The function that a checker of the recipe names. Raises `UserError` if it cannot be made here."""
    match checker:
        case "number":
            return partial(_is_same, number)
        case "exact":
            return partial(_is_same, str.strip)
        case "math":
            return MathCheck()
        case Regex(regex=pattern):
            return partial(_is_same, matcher(pattern))
        case JsonSchema(json_schema=schema):
            return json_check(schema)
        case Function(function=name):
            return partial(_call, load_function(name))


def check_responses(check: Check, responses: Sequence[str], rows: Sequence[Rendered]) -> list[float | None]:
    """The result of each response. One on which the checker fails counts as wrong, and is printed.

    The checker is the user's and was tried on real responses. What it meets here is whatever a model wrote.
    """
    results: list[float | None] = []
    failures: list[str] = []
    for response, row in zip(responses, rows, strict=True):
        try:
            results.append(check(response, row))
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}, on a response to row {row.row}")
            results.append(0.0)
    if failures:
        info(f"note: evaluate.checker failed on {len(failures):,} responses, which count as wrong: {failures[0]}")
    return results


def number(text: str) -> str | None:
    """The number after the last ####, as in GSM8K: "#### 1,234.0" and "#### $1234" are the same.

    None if there are several, as in 3/4, 2:45 or 1e5: comparing the first of them would call 3/4 and 3 equal.
    """
    marked = AFTER_MARK.findall(text)
    found = NUMBER.findall(unicodedata.normalize("NFKC", marked[-1]).translate(MINUS)) if marked else []
    if len(found) != 1:
        return None
    sign, digits = found[0]
    return str(Decimal(sign + digits.replace(",", "")).normalize() + 0)  # + 0: so that -0 is 0


def matcher(pattern: str) -> Extract:
    """In the pattern's last match, the first group that took part, or the whole match if there are no groups.

    None if that is empty: of alternatives with groups of their own, an unused one would equal every other unused one.
    """
    compiled = re.compile(pattern)

    def extract(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        if not matches:
            return None
        groups = matches[-1].groups() if compiled.groups else (matches[-1].group(),)
        return next((group.strip() for group in groups if group is not None), None) or None

    return extract


def _is_same(extract: Extract, response: str, row: Rendered) -> float | None:
    wanted = extract(row.real)
    return None if wanted is None else float(extract(response) == wanted)


class MathCheck:
    """Whether math-verify finds two answers equal: "3/4", "0.75" and a LaTeX fraction are.

    In a limited process, since a response may contain 9**9**9**9. What exceeds the limits is not correct.
    """

    def __init__(self) -> None:
        if not find_spec("math_verify"):
            raise UserError("evaluate.checker: math needs math-verify. Run pip install 'sparring[math]'.")
        self.process: BoundedProcess | None = None

    def __call__(self, response: str, row: Rendered) -> float | None:
        self.process = self.process or BoundedProcess({"agree": _math_agrees})
        try:
            return self.process("agree", response, row.real)[0]
        except CallFailed:
            return 0.0
        except LimitExceeded:
            self.process = None
            return 0.0


def _math_agrees(response: str, real: str) -> list[float | None]:
    """Runs in the child process."""
    from math_verify import parse, verify

    wanted = parse(real)
    return [float(verify(wanted, parse(response))) if wanted else None]


def json_check(schema: dict[str, Any]) -> Check:
    """Whether a response is JSON that a schema accepts. References to other files or addresses are not followed."""
    try:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry
    except ImportError as error:
        raise UserError(
            "evaluate.checker: json_schema needs jsonschema. Run pip install 'sparring[json-schema]'."
        ) from error
    validator = validator_for(schema, default=Draft202012Validator)
    try:
        validator.check_schema(schema)
    except SchemaError as error:
        raise UserError(
            f"evaluate.checker: json_schema is not a JSON Schema: {error.message} at {error.json_path}."
        ) from error
    is_valid = validator(schema, registry=Registry()).is_valid

    def check(response: str, row: Rendered) -> float:
        try:
            value = json.loads(response, parse_constant=_refuse_constant)
        except (ValueError, RecursionError):
            return 0.0
        return float(is_valid(value))

    return check


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


@cache  # every evaluation asks, and the user's module may load a model
def load_function(name: str) -> Callable[[str, str, Mapping[str, object]], float]:
    """The Python function `module:function` or `file.py:function`. Raises `UserError` without one."""
    source, _, attribute = name.rpartition(":")
    try:
        function = getattr(_execute(Path(source)) if source.endswith(".py") else import_module(source), attribute)
    except Exception as error:  # the user's module may raise anything
        raise UserError(
            f"evaluate.checker: {name} cannot be imported: {type(error).__name__}: {error}. Write file.py:function "
            "or module:function."
        ) from error
    if not isfunction(function) or getsourcefile(unwrap(function)) is None:
        raise UserError(f"evaluate.checker: {name} is no function with a source file. Define one with def.")
    return function


def _execute(file: Path) -> object:
    """The module in a file. It is registered, since dataclasses, for one, look for their module."""
    name = f"sparring_checker_{file.stem}"
    spec = spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None  # of any path that ends with .py
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_files(checker: Checker | None) -> list[Path]:
    """The files that a checker is defined in, which a run records by hash."""
    if not isinstance(checker, Function):
        return []
    file = getsourcefile(unwrap(load_function(checker.function)))
    return [] if file is None else [Path(file).resolve()]


def _call(function: Callable[..., object], response: str, row: Rendered) -> float:
    result = function(row.prompt, response, json.loads(row.source))
    if not isinstance(result, Real) or not 0 <= float(result) <= 1:
        raise ValueError(f"it returned {result!r}, not a number from 0 to 1")
    return float(result)
