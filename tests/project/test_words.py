"""The words that this project does not use: README, docs, src and tests are searched for each of them.

They are phrases that a reader has to decode, and names that say nothing without their docstring.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUFFIXES = {".py", ".md", ".j2", ".yaml", ".toml", ".js", ".css"}

PHRASES = {
    "shares out": r"\bshar(?:e|es|ed|ing)(?: (?:it|them|that|the \w+))? out\b",
    "begins anew": r"\b(?:begin|begins|began|begun|made|makes|make|starts?|drawn|measured) anew\b",
    "goes on": r"\b(?:go|goes|going|went|gone) on\b(?! (?:sale|strike))",
    "is none": r"\b(?:is|are|be) (?-i:none)\b",
    "rounds otherwise": r"\bround(?:s|ed|ing)? otherwise\b",
    "mend": r"\bmend(?:s|ed|ing)?\b",
    "stands still": r"\b(?:stand|stands|stood) still\b",
    "by itself": r"\bby itself\b",
    "as it comes": r"\bas (?:it comes|they come)\b",
    "tokens at a time": r"\b(?:tokens|prompts|rows) at a time\b|\bless at a time\b|\bat_a_time\b",
    "a life": r"\ba life\b",
    "strangers' text": r"\bstranger(?:s|'s|s')? (?:text|texts|store|data|model)\b|\bstranger_s_\w+",
    "worries": r"\bworr(?:y|ies)\b",
    "orders": r"\borders (?:the|a|its) (?:run|process|ranks?)\b",
}
NAMES = {
    "meet()": r"(?<![\w.])(?:\w+\.)?meet\(",
    "hear()": r"\bhear\(",
    "bury()": r"\bbury\(",
    "knock()": r"\bknock\(",
    "NEUTRAL": r"\bNEUTRAL\b",
    "Play()": r"\bPlay\(|\blist\[Play\]|-> Play\b",
    "story": r"(?<!\w)story(?:\(|\.py|\b(?= *=))|\breport[./]story\b",
    "tiles": r"\btiles\b",
    "own_recipe": r"\bown_recipe\b",
    "prove_same_model": r"\bprove_same_model\b",
    "first_says": r"\bfirst_says\b",
    "visible.py": r"\bvisible\.py\b|\|visible\b|\bsparring\.visible\b",
    "moments.py": r"\bmoments\.py\b|\bsparring\.moments\b",
    "links.py": r"\blinks\.py\b|\bsparring\.links\b|\bLINKS\b",
    "game.py": r"\bgame\.py\b|\bgame_metrics\b(?<!self_play_metrics)|\bsparring\.game\b",
    "libraries.py": r"\blibraries\.py\b|\bsparring\.libraries\b",
}
BANNED = {
    **{word: re.compile(pattern, re.IGNORECASE) for word, pattern in PHRASES.items()},
    **{name: re.compile(pattern) for name, pattern in NAMES.items()},
}


def searched() -> Iterator[Path]:
    yield ROOT / "README.md"
    for folder in ("docs", "src", "tests"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES and "__pycache__" not in path.parts and path != Path(__file__):
                yield path


def uses(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """(line number, the words), also where a phrase runs over the end of a line."""
    flat = re.sub(r"\n[ \t]*(?:#|>|\*)?[ \t]*", lambda match: " " * len(match.group()), text)
    flat = flat.replace("_", " ") if " " in pattern.pattern else flat
    for match in pattern.finditer(re.sub(r" (?= )", "\x00", flat)):
        yield text.count("\n", 0, match.start()) + 1, match.group().replace("\x00", "")


@pytest.mark.parametrize("word", BANNED)
def test_a_word_that_is_not_used(word: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {words}"
        for path in searched()
        for line, words in uses(path.read_text(encoding="utf-8"), BANNED[word])
    ]
    assert not found, f"{len(found)} uses of '{word}':\n" + "\n".join(found)
