"""What a chat template leaves out of a conversation. Templates drop what they do not know without an error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparring.data.read import BadRow
from sparring.types import Message

THOUGHT_TAG = re.compile(r"(</?(?:\w+:)?(?:think|thinking|thought|reason|reasoning)>)")
REMEDY = "Set data.template to a template that writes them, or remove them from the row"

Tools = Sequence[Mapping[str, Any]]
Render = Callable[[Sequence[Message], Tools], str]


def find_losses(messages: Sequence[Message], tools: Tools, text: str, response: str, render: Render) -> tuple[str, ...]:
    """What of a conversation is not in its rendered `text`, in words.

    Raises `BadRow` where that changes the task: tools, calls, and parts of the response. A plain conversation whose
    turns are found in order needs nothing else. Otherwise every part is replaced by a mark of its own, and the
    conversation is rendered once more: a mark that is missing was a part that the template does not read.
    """
    for part, _ in _parts(messages[-1]):
        if part not in response:
            raise BadRow(f"the chat template leaves out a part of the response: {part[:40]!r}")
    if not tools and not any(_is_special(message) for message in messages) and _are_in_order(messages[:-1], text):
        return ()
    marks = Marks()
    written = render([marks.turn(messages, index) for index in range(len(messages))], [marks.tool(t) for t in tools])
    losses = set[str]()
    for mark, (what, part) in marks.parts.items():
        if mark in written:
            if part is not None and not _is_written(part, text):
                losses.add(f"a part of {what}, which the template rewrites")
        elif part is None:
            raise BadRow(f"the chat template leaves out {what}. {REMEDY}")
        else:
            losses.add(what)
    return tuple(sorted(losses))


@dataclass
class Marks:
    """Copies of turns and tools in which every part is a mark, and what each mark stands for."""

    parts: dict[str, tuple[str, str | None]] = field(default_factory=dict[str, tuple[str, str | None]])
    """Mark -> (what it stands for, its text; None if it must not be missing)."""

    def add(self, what: str, part: str | None) -> str:
        mark = f"sparring{len(self.parts)}mark"
        self.parts[mark] = (what, part)
        return mark

    def turn(self, messages: Sequence[Message], index: int) -> Message:
        """The response keeps its text, which is looked for as it is: a thought may be written where none was read."""
        message, change = messages[index], dict[str, object]()
        if index < len(messages) - 1:
            pieces = _pieces(message)
            for place, (part, is_thought) in enumerate(pieces):
                if part.strip() and not THOUGHT_TAG.fullmatch(part):
                    what = "the thought of an earlier turn" if is_thought else f"a turn of the {message['role']}"
                    pieces[place] = (self.add(what, part.strip()), is_thought)
            if message["content"]:
                change["content"] = "".join(part for part, _ in pieces)
            if message.get("reasoning_content", "").strip():
                thought = message["reasoning_content"].strip()
                change["reasoning_content"] = self.add("the thought of an earlier turn", thought)
        if "name" in message and message["role"] != "tool":
            change["name"] = self.add(f"'name' of a turn of the {message['role']}", message["name"])
        if "tool_calls" in message:
            what = f"the tool calls of turn {index + 1}"
            change["tool_calls"] = [
                {**call, "function": {"name": self.add(what, None), "arguments": {"x": self.add(what, None)}}}
                for call in message["tool_calls"]
            ]
        return Message({**message, **change})

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        mark = self.add("the row's tools", None)
        if "function" in tool:
            return {**tool, "function": {**tool["function"], "name": mark}}
        return {**tool, "name": mark}


def _pieces(message: Message) -> list[tuple[str, bool]]:
    """(text, whether it is a thought) of the content, with the tags of thoughts as pieces of their own."""
    content = message["content"] or ""
    pieces = THOUGHT_TAG.split(content) if message["role"] == "assistant" else [content]
    return [(piece, place < len(pieces) - 1) for place, piece in enumerate(pieces)]


def _parts(message: Message) -> Iterator[tuple[str, bool]]:
    """What a turn says, without the tags: (text, whether it is a thought), in the order in which templates write it."""
    if thought := message.get("reasoning_content", "").strip():
        yield thought, True
    for piece, is_thought in _pieces(message):
        if piece.strip() and not THOUGHT_TAG.fullmatch(piece):
            yield piece.strip(), is_thought


def _is_special(message: Message) -> bool:
    """Whether a turn has more than its role and its text."""
    return len(message) > 2


def _are_in_order(messages: Sequence[Message], text: str) -> bool:
    place = 0
    for message in messages:
        for part, _ in _parts(message):
            found = text.find(part, place)
            if found < 0:
                return False
            place = found + len(part)
    return True


def _is_written(part: str, text: str) -> bool:
    """As it is, or as JSON strings are escaped."""
    return any(form in text for form in (part, *(json.dumps(part, ensure_ascii=a)[1:-1] for a in (True, False))))
