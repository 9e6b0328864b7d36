"""Checkers: whether a response agrees with the real one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from decimal import Decimal
from importlib.util import find_spec

from sparring.data.bounded import BoundedProcess, CallFailed, LimitExceeded
from sparring.errors import UserError
from sparring.recipe.schema import Regex

Check = Callable[[str, str], bool | None]
"""(response, real response) -> whether they agree; None if the real one has no answer to compare."""
Extract = Callable[[str], str | None]
"""Extracts the comparable answer of a response; None if it has none."""

AFTER_MARK = re.compile(r"####\s*([^\n]*)")
NUMBER = re.compile(r"(-?)\s*[$€£¥]?\s*((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)")
MINUS = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"))


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


def exact(text: str) -> str | None:
    """The whole text, stripped."""
    return text.strip()


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


class MathCheck:
    """Whether math-verify finds two answers equal: "3/4", "0.75" and a LaTeX fraction are.

    In a limited process, since a response may contain 9**9**9**9. What exceeds the limits is not correct.
    """

    def __init__(self) -> None:
        require_math_verify()
        self.process: BoundedProcess | None = None

    def __call__(self, response: str, real: str) -> bool | None:
        self.process = self.process or BoundedProcess({"agree": _math_agrees})
        try:
            return self.process("agree", response, real)[0]
        except CallFailed:
            return False
        except LimitExceeded:
            self.process = None
            return False


def _math_agrees(response: str, real: str) -> list[bool | None]:
    """Runs in the child process."""
    from math_verify import parse, verify

    wanted = parse(real)
    return [verify(wanted, parse(response)) if wanted else None]


def require_math_verify() -> None:
    if not find_spec("math_verify"):
        raise UserError("evaluate.checker: math needs math-verify. Run pip install 'sparring[math]'.")


def make_check(checker: str | Regex) -> Check:
    match checker:
        case "number":
            return _same(number)
        case "exact":
            return _same(exact)
        case "math":
            return MathCheck()
        case Regex(regex=pattern):
            return _same(matcher(pattern))
        case _:
            raise ValueError(f"unknown checker {checker!r}")


def _same(extract: Extract) -> Check:
    def check(response: str, real: str) -> bool | None:
        wanted = extract(real)
        return None if wanted is None else extract(response) == wanted

    return check
