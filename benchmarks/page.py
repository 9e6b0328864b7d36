"""Tables that scripts put into pages of docs/, each between `<!-- MARK: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence


def filled(page: str, mark: str, table: Callable[[str], Sequence[str]]) -> str:
    """The page with the lines that `table` has for each name in place of what stands there."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n" + "\n".join(table(match[2])) + "\n<!-- end -->"

    return re.sub(rf"(<!-- {mark}: ([^>]+?) -->)\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
