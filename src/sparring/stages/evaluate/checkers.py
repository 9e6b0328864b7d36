"""Checkers: whether a response agrees with the real one."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

from sparring.recipe.schema import Regex

Extract = Callable[[str], str | None]
"""Extracts the comparable answer of a response; None if it has none."""

AFTER_MARK = re.compile(r"####\s*([^\n]*)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def number(text: str) -> str | None:
    """The number after the last ####, as in GSM8K: "#### 1,234.0" and "#### $1234" are the same."""
    marked = AFTER_MARK.findall(text)
    found = NUMBER.search(marked[-1]) if marked else None
    if not found:
        return None
    try:
        value = Decimal(found.group().replace(",", ""))
    except InvalidOperation:
        return None
    return str(value.normalize() + 0)  # + 0: so that -0 is 0


def exact(text: str) -> str | None:
    """The whole text, stripped."""
    return text.strip()


def matcher(pattern: str) -> Extract:
    """The first group of the pattern's last match, or the whole match."""
    compiled = re.compile(pattern)

    def extract(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        return (matches[-1].group(1 if compiled.groups else 0) or "").strip() if matches else None

    return extract


def make_extract(checker: str | Regex) -> Extract:
    match checker:
        case "number":
            return number
        case "exact":
            return exact
        case Regex(regex=pattern):
            return matcher(pattern)
        case _:
            raise ValueError(f"unknown checker {checker!r}")


def is_correct(extract: Extract, answer: str, real: str) -> bool | None:
    """Whether a response agrees with the real one; None if the real one has no comparable answer."""
    wanted = extract(real)
    return None if wanted is None else extract(answer) == wanted
