"""Detects the format of supervised data and converts its rows to conversations."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import xxhash

from sparring.data.conversation import as_turns, extras, is_trained, text, tools, turn, turns, without_extras
from sparring.data.read import BadRow, Row
from sparring.errors import CorruptedError, UserError
from sparring.types import Example, Message, Rendered

Turns = Literal["last", "first", "all"]

INVISIBLE = "\u200b-\u200f\u2060\ufeff"
BLANK = re.compile(rf"[\s{INVISIBLE}]*")
"""White space and zero-width characters."""
SENTENCE_END = r"(?<=[.!?])[\"”']?(?=\s)"


SHARED = ("system", "tools")
"""Columns that every format may have: a system prompt, and JSON schemas of the tools that calls refer to."""


@dataclass(frozen=True)
class RowFormat:
    """The columns of a row in this format, and the function that converts them to the turns of a conversation."""

    name: str
    columns: tuple[str, ...]
    to_turns: Callable[[Row], list[Message]]
    optional: tuple[str, ...] = ()

    @property
    def known(self) -> set[str]:
        return {*self.columns, *self.optional, *SHARED}

    def conversation(self, row: Row) -> list[Message]:
        found, system = self.to_turns(row), row.get("system")
        if not system:
            return found
        first = turn("system", system)
        if found and found[0]["role"] == "system":
            if found[0]["content"] != first["content"]:
                raise BadRow("the row has a 'system' column and another system turn. Keep one of them")
            return found
        return [first, *found]


def _alpaca(row: Row) -> list[Message]:
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRow("'history' must be a list of [question, answer] pairs")
    earlier = [turn(role, said) for pair in history for role, said in zip(("user", "assistant"), pair, strict=True)]
    extra = text(row.get("input") or "")
    question = text(row["instruction"]) + (f"\n\n{extra}" if extra.strip() else "")
    return [*earlier, turn("user", question), turn("assistant", row["output"])]


def _prompt_chosen(row: Row) -> list[Message]:
    """Some preference data repeat the prompt in `chosen`, some do not."""
    prompt, chosen = as_turns(row["prompt"], "user"), as_turns(row["chosen"], "assistant")
    return chosen if chosen[: len(prompt)] == prompt else [*prompt, *chosen]


PREFERENCES = (
    RowFormat("prompt/chosen", ("prompt", "chosen"), _prompt_chosen, ("rejected",)),
    RowFormat("chosen/rejected", ("chosen", "rejected"), lambda row: turns(row["chosen"])),
)
FORMATS = (
    PREFERENCES[0],  # before `messages`, which in UltraFeedback repeats `chosen`
    RowFormat("messages", ("messages",), lambda row: turns(row["messages"])),
    RowFormat("conversations", ("conversations",), lambda row: turns(row["conversations"], "from", "value")),
    RowFormat(
        "prompt/completion",
        ("prompt", "completion"),
        lambda row: [*as_turns(row["prompt"], "user"), *as_turns(row["completion"], "assistant")],
    ),
    RowFormat("real", ("real",), lambda row: as_turns(row["real"], "assistant")),
    RowFormat("alpaca", ("instruction", "output"), _alpaca, ("input", "history")),
    RowFormat(
        "question/answer",
        ("question", "answer"),
        lambda row: [turn("user", row["question"]), turn("assistant", row["answer"])],
    ),
    PREFERENCES[1],
)


def detect_format(row: Row, columns: Mapping[str, str], split_on: str | None, source: str) -> RowFormat:
    """The first format whose columns the row has. `columns` maps the names used here to the user's."""
    known = {name for row_format in FORMATS for name in row_format.known} | {"text"}
    for name, column in columns.items():
        if name not in known:
            raise UserError(f"data.columns: unknown name '{name}'. Use one of {', '.join(sorted(known))}.")
        if column not in row:
            raise UserError(f"data.columns: {source} has no column '{column}'. It has {', '.join(map(str, row))}.")
    available = rename_columns(row, columns)
    formats = _formats(split_on)
    for row_format in formats:
        if all(name in available for name in row_format.columns) and set(columns) <= row_format.known:
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


def _formats(split_on: str | None) -> tuple[RowFormat, ...]:
    return (*FORMATS, RowFormat("text", ("text",), _splitter(split_on)))


def example_of(row: Rendered, columns: Mapping[str, str], split_on: str | None, which: Turns) -> Example:
    """The example that a row was rendered from: the one of the user's row whose hash is the id."""
    source = rename_columns(json.loads(row.source), columns)
    for row_format in _formats(split_on):
        with suppress(BadRow):
            for example in examples(source, row.row, row_format, which):
                if example.id == row.id:
                    return example
    raise CorruptedError(f"row {row.row}: no example of its source has the id {row.id}")


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    return {**row, **{name: row[column] for name, column in columns.items() if column in row}}


def examples(row: Row, number: int, row_format: RowFormat, which: Turns) -> list[Example]:
    """The examples of a row: its conversation up to each assistant turn that `which` selects.

    A turn with `weight: 0` or `train: false` is context: it stands in the prompts of later turns and is no example.
    """
    missing = [name for name in row_format.columns if row.get(name) is None]
    if missing:
        raise BadRow(f"'{missing[0]}' is missing")
    raw, schemas = row_format.conversation(row), tools(row.get("tools"))
    conversation = [without_extras(message) for message in raw]
    users = [index for index, message in enumerate(conversation) if message["role"] == "user"]
    answers = [i for i, m in enumerate(conversation) if m["role"] == "assistant" and users and i > users[0]]
    targets = [index for index in answers if is_trained(raw[index])]
    if not targets:
        why = ": each has weight 0 or train false" if answers else " after a user turn"
        raise BadRow(f"no assistant turn{' to train' if answers else ''}{why}")
    left_out = tuple(sorted({f"'{key}' of a turn" for message in raw for key in extras(message)}))
    result = []
    for end in {"last": targets[-1:], "first": targets[:1], "all": targets}[which]:
        messages = tuple(conversation[: end + 1])
        result.append(Example(_hash(messages, schemas), number, messages, schemas, left_out=left_out))
    if row_format in PREFERENCES and row.get("rejected") is not None:
        result = [replace(example, rejected=_rejected(row, row_format, example)) for example in result]
    for example in result:
        if BLANK.fullmatch(example.answer) and "tool_calls" not in example.messages[-1]:
            raise BadRow("the response is empty")
        if not any(m["role"] == "user" and not BLANK.fullmatch(m["content"]) for m in example.messages):
            raise BadRow("the prompt is empty")
    return result


def _rejected(row: Row, row_format: RowFormat, example: Example) -> Message | None:
    """The rejected response to the same prompt, or None. Only DPO reads it, so an invalid one is not an error here."""
    try:
        *before, last = map(without_extras, row_format.conversation({**row, "chosen": row["rejected"]}))
    except BadRow:
        return None
    is_usable = last["role"] == "assistant" and ((last["content"] or "").strip() or "tool_calls" in last)
    return last if is_usable and tuple(before) == example.messages[:-1] else None


def prompt_key(example: Example) -> str:
    """Hash of the first user turn that says something, without differences of case, white space and Unicode form.

    Rows with one key stay on one side of the held-out split, whatever their system prompts.
    """
    said = next(m["content"] for m in example.messages if m["role"] == "user" and not BLANK.fullmatch(m["content"]))
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", said).casefold())
    return xxhash.xxh3_64_hexdigest(" ".join(re.sub(f"[{INVISIBLE}]", "", plain).split()).encode())


def exact_prompt_key(example: Example) -> str:
    """Hash of everything up to the first user turn, as it is written."""
    first_user = next(i for i, m in enumerate(example.messages) if m["role"] == "user")
    return _hash(example.messages[: first_user + 1], example.tools)


def _hash(messages: tuple[Message, ...], schemas: tuple[Mapping[str, Any], ...]) -> str:
    content = [list(messages), list(schemas)] if schemas else list(messages)
    return xxhash.xxh3_64_hexdigest(json.dumps(content, ensure_ascii=False, sort_keys=True).encode())


def _splitter(split_on: str | None) -> Callable[[Row], list[Message]]:
    try:
        boundary = re.compile(SENTENCE_END if split_on == "sentence" else split_on or "")
    except re.error as error:
        raise UserError(f"data.split_on: '{split_on}' is not a valid regular expression: {error}.") from error

    def split(row: Row) -> list[Message]:
        whole = text(row["text"])
        match = boundary.search(whole)
        if not match:
            raise BadRow("data.split_on matches nothing in the text")
        end = match.end() if split_on == "sentence" else match.start()
        return [turn("user", whole[:end]), turn("assistant", whole[end:])]

    return split
