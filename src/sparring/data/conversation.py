"""Turns as chat templates take them: text, thoughts, tool calls, and whether a turn is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sparring.data.read import BadRow
from sparring.types import Message

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names that data sets and templates give the thought before an answer. Here it is `reasoning_content`."""
KEYS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")
"""What a template is given of a turn."""


def turns(value: object, role_key: str = "role", content_key: str = "content") -> list[Message]:
    """A list of turns. Raises `BadRow`."""
    if not isinstance(value, list) or not value:
        raise BadRow("the conversation must be a list of turns")
    return [_turn(one, number, role_key, content_key) for number, one in enumerate(value, start=1)]


def as_turns(value: object, role: str) -> list[Message]:
    """A prompt or a completion, given as a text or as turns."""
    return turns(value) if isinstance(value, list) else [turn(role, value)]


def turn(role: object, content: object) -> Message:
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"unknown role {role!r} (known roles: {', '.join(ROLES)})")
    return Message(role=ROLES[role], content=text(content))


def is_trained(message: Message) -> bool:
    """Whether the turn may be a response to learn: not with `weight: 0` or `train: false`."""
    return bool(message.get("weight", 1)) and bool(message.get("train", True))


def without_extras(message: Message) -> Message:
    """The turn with the keys that templates are given."""
    return Message({key: message[key] for key in KEYS if key in message})


def extras(message: Message) -> list[str]:
    """Keys that no template is given."""
    return [str(key)[:40] for key in message if key not in (*KEYS, "weight", "train")]


def _turn(raw: object, number: int, role_key: str, content_key: str) -> Message:
    if not isinstance(raw, dict) or role_key not in raw:
        raise BadRow(f"turn {number} needs '{role_key}' and '{content_key}'")
    given = {key: value for key, value in raw.items() if value is not None and value not in ("", [], {})}
    role, content = given.pop(role_key, raw[role_key]), raw.get(content_key)
    given.pop(content_key, None)
    calls = _tool_calls(given.pop("tool_calls", []), number)
    if content is None and not calls:
        if content_key in raw:
            raise BadRow(f"expected a string, got null: the content of turn {number}")
        raise BadRow(f"turn {number} needs '{role_key}' and '{content_key}'")
    message = turn(role, "" if content is None else content)
    if content is None:
        message["content"] = None
    thought = next((given.pop(key) for key in THOUGHTS if isinstance(given.get(key), str)), None)
    if message["role"] == "assistant":
        if thought is not None:
            message["reasoning_content"] = text(thought)
        if calls:
            message["tool_calls"] = calls
    elif calls or thought is not None:
        raise BadRow(f"turn {number} of the {message['role']} has {'tool calls' if calls else 'a thought'}")
    given |= {key: text(given[key]) for key in ("name", "tool_call_id") if key in given}
    if "function_call" in given:
        raise BadRow(f"turn {number} has 'function_call'. Write it as 'tool_calls'")
    _check_weight(given, message["role"], number)
    return Message({**message, **given})


def _check_weight(given: Mapping[str, object], role: str, number: int) -> None:
    weight, train = given.get("weight"), given.get("train")
    if weight not in (None, 0, 1):
        raise BadRow(f"turn {number} has weight {weight!r}. Use 0 or 1")
    if train not in (None, True, False):
        raise BadRow(f"turn {number} has train {train!r}. Use true or false")
    if role != "assistant" and (weight or train):
        raise BadRow(
            f"turn {number} of the {role} has {'weight 1' if weight else 'train true'}, but only assistant turns can "
            "be trained. Remove it"
        )


def _tool_calls(value: object, number: int) -> list[dict[str, Any]]:
    """Calls as templates read them: {type, function: {name, arguments}}, with arguments as an object."""
    if not isinstance(value, list):
        raise BadRow(f"the tool calls of turn {number} must be a list")
    calls = []
    for call in value:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRow(f"a tool call of turn {number} needs a function with a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f"the arguments of a tool call of turn {number}")
        if not isinstance(arguments, dict):
            raise BadRow(f"the arguments of a tool call of turn {number} must be an object")
        wanted = _checked({"name": function["name"], "arguments": arguments}, f"a tool call of turn {number}")
        calls.append({"type": "function", **({"id": call["id"]} if call.get("id") else {}), "function": wanted})
    return calls


def tools(value: object) -> tuple[dict[str, Any], ...]:
    """A row's `tools`: a list of JSON schemas, or such a list as a text."""
    if isinstance(value, str) and value.strip():
        value = _parsed(value, "'tools'")
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) and _name(tool) for tool in value):
        raise BadRow("'tools' must be a list of JSON schemas with names")
    return tuple(_checked(tool, "'tools'") for tool in value)


def _name(tool: dict[str, Any]) -> object:
    function = tool.get("function", tool)
    return function.get("name") if isinstance(function, dict) else None


def _checked(value: dict[str, Any], what: str) -> dict[str, Any]:
    """Refuses what JSON cannot hold, such as dates in a Parquet file."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(f"{what}: not valid JSON: {error}") from error
    return value


def _parsed(value: str, what: str) -> object:
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{what}: not valid JSON: {error}") from error


def text(value: object) -> str:
    if isinstance(value, list):  # typed parts
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise BadRow("the content has parts that are not text")
        value = "".join(text(part.get("text", part.get("value"))) for part in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)  # numeric answers are common
    if not isinstance(value, str):
        raise BadRow(f"expected a string, got {'null' if value is None else type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"not valid Unicode: {error.reason}") from error
    return value
