"""Detects the format of supervised data and converts its rows to conversations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import xxhash

from sparring.data.read import BadRow, Row
from sparring.errors import UserError
from sparring.types import Example, Message

Turns = Literal["last", "first", "all"]

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
}

BLANK = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]*")
"""White space and zero-width characters."""
SENTENCE_END = r"(?<=[.!?])[\"”']?(?=\s)"


@dataclass(frozen=True)
class RowFormat:
    """The columns of a row in this format, and the function that converts them to the turns of a conversation."""

    name: str
    columns: tuple[str, ...]
    to_turns: Callable[[Row], list[Message]]
    optional: tuple[str, ...] = ()

    def conversation(self, row: Row) -> list[Message]:
        system = row.get("system") if "system" in self.optional else None
        return [*([_message("system", system)] if system else []), *self.to_turns(row)]


def _alpaca(row: Row) -> list[Message]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow("'history' must be a list of [question, answer] pairs")
    earlier = [_message(role, text) for turn in history for role, text in zip(("user", "assistant"), turn, strict=True)]
    extra = _text(row.get("input") or "")
    question = _text(row["instruction"]) + (f"\n\n{extra}" if extra.strip() else "")
    return [*earlier, _message("user", question), _message("assistant", row["output"])]


def _prompt_chosen(row: Row) -> list[Message]:
    """Some preference data repeat the prompt in `chosen`, some do not."""
    prompt, chosen = _as_messages(row["prompt"], "user"), _as_messages(row["chosen"], "assistant")
    return chosen if chosen[: len(prompt)] == prompt else [*prompt, *chosen]


PREFERENCES = RowFormat("prompt/chosen", ("prompt", "chosen"), _prompt_chosen, ("system", "rejected"))
FORMATS = (
    RowFormat("messages", ("messages",), lambda row: _turns(row["messages"], "role", "content")),
    RowFormat(
        "conversations", ("conversations",), lambda row: _turns(row["conversations"], "from", "value"), ("system",)
    ),
    RowFormat(
        "prompt/completion",
        ("prompt", "completion"),
        lambda row: [*_as_messages(row["prompt"], "user"), *_as_messages(row["completion"], "assistant")],
        ("system",),
    ),
    PREFERENCES,
    RowFormat("real", ("real",), lambda row: _as_messages(row["real"], "assistant")),
    RowFormat("alpaca", ("instruction", "output"), _alpaca, ("input", "system", "history")),
    RowFormat(
        "question/answer",
        ("question", "answer"),
        lambda row: [_message("user", row["question"]), _message("assistant", row["answer"])],
        ("system",),
    ),
)


def detect_format(row: Row, columns: Mapping[str, str], split_on: str | None, source: str) -> RowFormat:
    """The first format whose columns the row has. `columns` maps the names used here to the user's."""
    known = {name for row_format in FORMATS for name in (*row_format.columns, *row_format.optional)} | {"text"}
    for name, column in columns.items():
        if name not in known:
            raise UserError(f"data.columns: unknown name '{name}'. Use one of {', '.join(sorted(known))}.")
        if column not in row:
            raise UserError(f"data.columns: {source} has no column '{column}'. It has {', '.join(map(str, row))}.")
    available = rename_columns(row, columns)
    formats = (*FORMATS, RowFormat("text", ("text",), _splitter(split_on)))
    for row_format in formats:
        uses = {*row_format.columns, *row_format.optional}
        if all(name in available for name in row_format.columns) and set(columns) <= uses:
            if row_format.name == "text" and split_on is None:
                raise UserError(
                    f"data: the rows of {source} are plain text. Set data.split_on to 'sentence', or to a regular "
                    "expression at whose first match the prompt ends."
                )
            return row_format
    supported = "; ".join(" + ".join(row_format.columns) for row_format in formats)
    raise UserError(
        f"data: the columns of {source} ({', '.join(map(str, row))}) match no known format ({supported}). Map them "
        "with data.columns, for example {question: your_column, answer: other_column}."
    )


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    return {**row, **{name: row[column] for name, column in columns.items() if column in row}}


def examples(row: Row, number: int, row_format: RowFormat, turns: Turns) -> list[Example]:
    """The examples of a row: its conversation up to each assistant turn that `turns` selects."""
    missing = [name for name in row_format.columns if row.get(name) is None]
    if missing:
        raise BadRow(f"'{missing[0]}' is missing")
    conversation = row_format.conversation(row)
    seen_user, targets = False, []
    for index, message in enumerate(conversation):
        seen_user = seen_user or message["role"] == "user"
        if message["role"] == "assistant" and seen_user:
            targets.append(index)
    if not targets:
        raise BadRow("no assistant turn after a user turn")
    selected = {"last": targets[-1:], "first": targets[:1], "all": targets}[turns]
    result = [Example(_hash(conversation[: end + 1]), number, tuple(conversation[: end + 1])) for end in selected]
    if row_format is PREFERENCES and row.get("rejected") is not None:
        result = [replace(example, rejected=_rejected(row, example)) for example in result]
    for example in result:
        if BLANK.fullmatch(example.answer):
            raise BadRow("the response is empty")
        if not any(m["role"] == "user" and not BLANK.fullmatch(m["content"]) for m in example.messages):
            raise BadRow("the prompt is empty")
    return result


def _rejected(row: Row, example: Example) -> str | None:
    """The rejected response to the same prompt, or None. Only DPO reads it, so an invalid one is not an error here."""
    try:
        *before, last = PREFERENCES.conversation({**row, "chosen": row["rejected"]})
    except BadRow:
        return None
    return last["content"] if tuple(before) == example.messages[:-1] and last["content"].strip() else None


def prompt_key(example: Example) -> str:
    """Hash of everything up to the first user turn. Rows with the same key stay on one side of the held-out split."""
    first_user = next(i for i, m in enumerate(example.messages) if m["role"] == "user")
    return _hash(list(example.messages[: first_user + 1]))


def _hash(messages: list[Message]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(messages, ensure_ascii=False, sort_keys=True).encode())


def _splitter(split_on: str | None) -> Callable[[Row], list[Message]]:
    try:
        boundary = re.compile(SENTENCE_END if split_on == "sentence" else split_on or "")
    except re.error as error:
        raise UserError(f"data.split_on: '{split_on}' is not a valid regular expression: {error}.") from error

    def split(row: Row) -> list[Message]:
        text = _text(row["text"])
        match = boundary.search(text)
        if not match:
            raise BadRow("data.split_on matches nothing in the text")
        end = match.end() if split_on == "sentence" else match.start()
        return [_message("user", text[:end]), _message("assistant", text[end:])]

    return split


def _as_messages(value: object, role: str) -> list[Message]:
    """A prompt or a completion, given as a text or as messages."""
    return _turns(value, "role", "content") if isinstance(value, list) else [_message(role, value)]


def _turns(value: object, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRow("the conversation must be a list of turns")
    turns = []
    for index, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            raise BadRow(f"turn {index} needs '{role_key}' and '{content_key}'")
        turns.append(_message(turn[role_key], turn[content_key]))
    return turns


def _message(role: object, content: object) -> Message:
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"unknown role {role!r} (known roles: {', '.join(ROLES)})")
    return Message(role=ROLES[role], content=_text(content))


def _text(value: object) -> str:
    if isinstance(value, list):  # typed parts
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise BadRow("the content has parts that are not text")
        value = "".join(_text(part.get("text", part.get("value"))) for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # numeric answers are common
    if not isinstance(value, str):
        raise BadRow(f"expected a string, got {'null' if value is None else type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"not valid Unicode: {error.reason}") from error
    return value
