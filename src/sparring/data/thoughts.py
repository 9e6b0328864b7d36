"""Responses to prompts that open a thinking block, as DeepSeek-R1's and QwQ's templates do."""

from __future__ import annotations

import re

from sparring.data.read import BadRow
from sparring.types import Message

OPENED = re.compile(r"<((?:\w+:)?(?:think|thinking|thought|reason|reasoning))>\s*\Z")


def continue_thought(prompt: str, whole: str, last: Message, *, may_be_empty: bool) -> str | None:
    """What follows `prompt`, which opens a thinking block, in the conversation `whole`; None if it opens none.

    Such templates write conversations without the block, or with another one. The response is then the row's thought,
    the end of the block, and what the template writes for the answer. A row without a thought gets an empty one if it
    may; otherwise this raises `BadRow`. A block that the template itself writes stays as it is.
    """
    opened = OPENED.search(prompt)
    if opened is None or not whole.startswith(prompt[: opened.start()]):
        return None
    rest, tag = whole[opened.start() :], opened[1]
    if rest.startswith(opened[0]):
        return rest[len(opened[0]) :]
    answer = re.sub(rf"\A\s*<{tag}>.*?</{tag}>", "", rest, flags=re.DOTALL).lstrip("\n")
    found = re.match(rf"\s*(?:<{tag}>)?(.*)</{tag}>", last["content"] or "", re.DOTALL)
    thought = (last.get("reasoning_content") or (found[1] if found else "")).strip()
    if not thought and not may_be_empty:
        raise BadRow(
            f"the template opens <{tag}> in the prompt, and this response has no thought. Add one, as "
            f"'reasoning_content' or between <{tag}> and </{tag}>, or set data.empty_thought: true"
        )
    return f"{thought}\n</{tag}>\n\n{answer}"
