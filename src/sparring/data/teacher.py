"""The prompt of a teacher: the opponent, shown the real response (`types.Teacher`)."""

from __future__ import annotations

import re

import numpy as np

from sparring.data.read import BadRow
from sparring.data.render import Renderer
from sparring.types import Example, Message, Teacher, TokenIds


def teacher_prompt_ids(
    render: Renderer, teacher: Teacher, example: Example, real: str, response_tokens: int, context: int | None
) -> TokenIds:
    """The example's prompt with `teacher.prompt`, filled in, in place of the last user turn.

    `real`: the real response as text. Raises `BadRow` if a response of `response_tokens` does not fit behind it into
    the model's `context`.
    """
    *before, _ = example.messages
    last = max(index for index, message in enumerate(before) if message["role"] == "user")
    values = {"prompt": before[last]["content"], "response": real}
    filled = re.sub(r"\{(prompt|response)\}", lambda slot: values[slot[1]], teacher.prompt)
    before[last] = Message(before[last], content=filled)
    ids = np.array(render.prompt_ids(before, example.tools), dtype=np.int32)
    if context is not None and len(ids) + response_tokens > context:
        raise BadRow(
            f"the teacher's prompt has {len(ids)} tokens and leaves no room for a response of {response_tokens} (the "
            f"model's context is {context})"
        )
    return ids
