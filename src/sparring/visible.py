"""Text of models, data files and strangers, made harmless for a terminal and for the eye."""

from __future__ import annotations

import re

# C0 and C1 controls but for line feed and tab, and the characters that reorder or hide text
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with its control characters spelled out: an escape sequence is read, and not obeyed."""
    return INVISIBLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)
