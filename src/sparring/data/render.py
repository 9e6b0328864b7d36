"""Renders examples as token ids.

Every rendered row keeps three promises:
- The prompt ids are exactly what the generator receives.
- Prompt ids + response ids are the tokens of the full conversation, so the prompt is a strict prefix of it. Where a
  template opens a thinking block in the prompt, this holds for the text, and the response is tokenized on its own.
- The last response token is the end token that the model must emit, unless the response was truncated, which is marked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from sparring.data.bounded import BoundedProcess, CallFailed, LimitExceeded
from sparring.data.conversation import THOUGHTS
from sparring.data.read import BadRow
from sparring.data.template_loss import find_losses
from sparring.data.thoughts import continue_thought
from sparring.errors import UserError
from sparring.types import Example, Message, Rendered

PROBE = "sparring"
"""A response whose end is easy to find in a rendered conversation."""


Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class EndOfTurn:
    """The token that ends a response."""

    id: int
    is_in_template: bool
    num_tokens_after: int  # what the template writes after it


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text and token ids, cut where the response begins. The response includes its end token."""

    prompt: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    left_out: tuple[str, ...] = ()


class Renderer:
    """Renders conversations with the tokenizer's chat template, with a given one, or with a text that has {prompt}."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None,
        end_token: str | None,
        max_length: int,
        max_response: int | None,
        declared_ends: Collection[int] = (),
        empty_thought: bool = False,
    ) -> None:
        """`declared_ends`: the end tokens that the model's files declare."""
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_response = max_response
        self.declared_ends = declared_ends
        self.empty_thought = empty_thought
        self.text_template = template if is_text_template(template) else None
        self.chat_template = None if is_text_template(template) else template
        if self.text_template is not None and "{prompt}" not in self.text_template:
            raise UserError(f"data.template: {template!r} has no {{prompt}}. Add it where the prompt belongs.")
        if template is None and not tokenizer.chat_template:
            raise UserError(
                "data.template: the tokenizer has no chat template. Set a text such as "
                r'"### Instruction: {prompt}\n\n### Response: ".'
            )
        self._bounded = BoundedProcess({"render": self._render, "encode": self._encode})
        self.end = self._find_end_of_turn(end_token)
        bos = cast(int | None, tokenizer.bos_token_id)
        adds_bos = bos is not None and self._tokenize(PROBE, add_special_tokens=True)[:1] == [bos]
        self.bos_ids = [bos] if bos is not None and adds_bos else list[int]()

    @property
    def template_digest(self) -> str:
        """Hash of the template, so that a run notices a change."""
        used = self.text_template or self.chat_template or self.tokenizer.get_chat_template()
        return xxhash.xxh3_128_hexdigest(used.encode())

    def __call__(self, example: Example) -> Rendered:
        render = self._render_chat if self.text_template is None else self._render_text
        chat = render(example.messages, example.tools)
        rejected_ids = list[int]()
        if example.rejected is not None:
            rejected_ids = render([*example.messages[:-1], example.rejected], example.tools).response_ids
        available = self.max_length - len(chat.prompt_ids)
        if available < 1:
            raise BadRow(
                f"the prompt has {len(chat.prompt_ids)} tokens and leaves no room for a response (train.max_length is "
                f"{self.max_length})"
            )
        max_tokens = min(available, self.max_response or available)
        is_text = example.messages[-1].keys() <= {"role", "content"}
        return Rendered(
            id=example.id,
            row=example.row,
            prompt_ids=np.array(chat.prompt_ids, dtype=np.int32),
            real_ids=np.array(chat.response_ids[:max_tokens], dtype=np.int32),
            real_finish="stop" if len(chat.response_ids) <= max_tokens else "length",
            prompt=chat.prompt,
            real=example.answer if is_text else chat.response,
            rejected_ids=np.array(rejected_ids[:max_tokens], dtype=np.int32),
            left_out=tuple(sorted({*example.left_out, *chat.left_out})),
        )

    def prompt_ids(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Token ids of a prompt that has no response yet. Raises `BadRow`."""
        if self.text_template is not None:
            return self._fill(messages)[1]
        return self._tokenize(self.apply_template(messages, tools, add_generation_prompt=True))

    # White space that the template writes after the end token ("<|im_end|>\n") is not part of the response: a model
    # stops at the end token, and real and generated responses must have the same form.
    def _render_chat(self, messages: Sequence[Message], tools: Tools) -> RenderedChat:
        prompt = self.apply_template(messages[:-1], tools, add_generation_prompt=True)
        whole = self.apply_template(messages, tools)
        prompt_ids, all_ids = self._tokenize(prompt), self._tokenize(whole)
        if not prompt_ids:
            raise BadRow("the prompt has no tokens")
        if all_ids[: len(prompt_ids)] == prompt_ids:
            response, ids = whole.removeprefix(prompt), all_ids[len(prompt_ids) :]
        else:
            continued = continue_thought(prompt, whole, messages[-1], may_be_empty=self.empty_thought)
            if continued is None:
                raise BadRow(self._first_difference(prompt_ids, all_ids))
            response, ids = continued, self._tokenize(continued)
        left_out = find_losses(messages, tools, prompt + response, response, self.apply_template)
        if not self.end.is_in_template:
            end = self._end_of_call(messages, tools, whole) if "tool_calls" in messages[-1] else self.end.id
            return RenderedChat(prompt, response, prompt_ids, [*ids, end], left_out)
        ids = ids[: len(ids) - self.end.num_tokens_after]
        if not ids or ids[-1] not in {self.end.id, *self.declared_ends}:
            raise BadRow(f"the template does not end this response with {self._show(self.end.id)}")
        end_token = cast(str, self.tokenizer.convert_ids_to_tokens(ids[-1]))
        return RenderedChat(prompt, response.rpartition(end_token)[0] or response, prompt_ids, ids, left_out)

    # Trailing spaces of a text template belong to the response, where tokenizers put them: "Response: Yes" becomes
    # "Response", ":", " Yes".
    def _render_text(self, messages: Sequence[Message], tools: Tools) -> RenderedChat:
        last = messages[-1]
        if tools or any(message.keys() & {"tool_calls", "reasoning_content"} for message in messages):
            raise BadRow(
                "the row has tools, tool calls or a thought, which a text template cannot hold. Use a chat template"
            )
        prompt, prompt_ids, trailing_space = self._fill(messages[:-1])
        response = trailing_space + last["content"]
        all_ids = self._tokenize_with_bos(prompt + response)
        if all_ids[: len(prompt_ids)] != prompt_ids:
            raise BadRow(self._first_difference(prompt_ids, all_ids))
        left_out = tuple(sorted(f"'name' of a turn of the {m['role']}" for m in messages if "name" in m))
        return RenderedChat(prompt, response, prompt_ids, [*all_ids[len(prompt_ids) :], self.end.id], left_out)

    def _fill(self, before: Sequence[Message]) -> tuple[str, list[int], str]:
        """(prompt, its token ids, the trailing spaces that belong to the response) of a text template."""
        assert self.text_template is not None
        system = [m["content"] for m in before if m["role"] == "system"]
        users = [m["content"] for m in before if m["role"] == "user"]
        if len(before) != len(system) + 1 or len(users) != 1:
            raise BadRow("the conversation has several turns, but a text template takes one (set data.turns: first)")
        if system and "{system}" not in self.text_template:
            raise BadRow("the row has a system turn, but data.template has no {system}")
        values = {"system": "\n".join(system), "prompt": users[0]}
        filled = re.sub(r"\{(system|prompt)\}", lambda slot: values[slot[1]], self.text_template)
        prompt = filled.rstrip(" ")
        prompt_ids = self._tokenize_with_bos(prompt)
        if not prompt_ids:
            raise BadRow("the prompt has no tokens")
        return prompt, prompt_ids, filled[len(prompt) :]

    def apply_template(
        self, messages: Sequence[Message], tools: Tools = (), *, add_generation_prompt: bool = False
    ) -> str:
        """The chat template's text of a conversation. Raises `BadRow` if it refuses the conversation."""
        failed: CallFailed | None = None
        for form in _forms(messages):
            try:
                return self._bounded("render", form, list(tools) or None, add_generation_prompt)
            except CallFailed as error:
                failed = failed or error
            except LimitExceeded as error:
                raise UserError(
                    f"data.template: the chat template {error} on one conversation. Do not trust the model folder that "
                    "it comes from. Set data.template to a template of your own."
                ) from error
        raise BadRow(f"the chat template raised an error: {failed}") from failed

    def _render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, add_generation_prompt: bool
    ) -> str:
        """Runs in the child process."""
        return cast(
            str,
            self.tokenizer.apply_chat_template(
                messages,
                tools=cast(Any, tools),
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            ),
        )

    def _tokenize(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            return self._bounded("encode", text, add_special_tokens)
        except (CallFailed, LimitExceeded) as error:
            problem = f"failed ({error})" if isinstance(error, CallFailed) else str(error)
            raise UserError(
                f"model: the tokenizer in {self.tokenizer.name_or_path} {problem} on a text of {len(text):,} "
                "characters. Do not trust its tokenizer.json. Download it again from a source that you trust."
            ) from error

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Runs in the child process."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _tokenize_with_bos(self, text: str) -> list[int]:
        """Tokens of a plain text, with the BOS token in front if the tokenizer adds one."""
        return self.bos_ids + self._tokenize(text)

    def _find_end_of_turn(self, end_token: str | None) -> EndOfTurn:
        """`end_token` if it is set; else the first special token that the template writes after a response, or a
        declared one directly behind it; else the declared end token with which it begins the user's next turn, as GLM's
        does; else the EOS token."""
        wanted = None
        if end_token is not None:
            wanted = self.tokenizer.get_vocab().get(end_token)
            if wanted is None:
                raise UserError(f"data.end_token: the tokenizer has no token {end_token!r}.")
        if self.text_template is None:
            turns = [Message(role="user", content="?"), Message(role="assistant", content=PROBE)]
            try:
                tail = self._tokenize(self.apply_template(turns).rpartition(PROBE)[2])
            except BadRow as problem:
                raise UserError(f"data.template: {problem}") from problem
            special = self._special_ids()
            ends = [
                index for index, token in enumerate(tail) if (token in special if wanted is None else token == wanted)
            ]
            if ends:
                index = ends[0] if wanted is not None else self._declared_in_run(tail, ends)
                return EndOfTurn(tail[index], is_in_template=True, num_tokens_after=len(tail) - index - 1)
            if wanted is None:
                wanted = self._declared_after(turns, (), Message(role="user", content="?"))
        end = wanted if wanted is not None else self.tokenizer.eos_token_id
        if end is None:
            raise UserError("data.end_token: neither the template nor the tokenizer has an end token. Set one.")
        return EndOfTurn(cast(int, end), is_in_template=False, num_tokens_after=0)

    def _declared_in_run(self, tail: list[int], ends: list[int]) -> int:
        """The place of a declared end token in the first run of special tokens, or else of the first of them.

        Cohere's template writes <|END_RESPONSE|><|END_OF_TURN_TOKEN|>, and the model stops at the second one.
        """
        run = [index for step, index in enumerate(ends) if index == ends[0] + step]
        return next((index for index in run if tail[index] in self.declared_ends), ends[0])

    def _end_of_call(self, messages: Sequence[Message], tools: Tools, whole: str) -> int:
        """The end token of tool calls, for templates that write none: GLM's begins the tool's turn with another one."""
        after = self._declared_after(messages, tools, Message(role="tool", content=PROBE), whole)
        return self.end.id if after is None else after

    def _declared_after(
        self, messages: Sequence[Message], tools: Tools, following: Message, whole: str | None = None
    ) -> int | None:
        """The end token with which the template begins the turn `following`, if the model declares it as one."""
        try:
            longer = self.apply_template([*messages, following], tools)
            start = whole if whole is not None else longer[: longer.rfind(PROBE) + len(PROBE)]
        except BadRow:
            return None
        if not longer.startswith(start):
            return None
        first = self._tokenize(longer[len(start) :].lstrip())[:1]
        return first[0] if first and first[0] in self.declared_ends else None

    def _special_ids(self) -> set[int]:
        special = set(self.tokenizer.all_special_ids)
        return special | {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}

    def _first_difference(self, prompt_ids: list[int], all_ids: list[int]) -> str:
        pairs = enumerate(zip(prompt_ids, all_ids, strict=False))
        index = next((i for i, (alone, full) in pairs if alone != full), min(len(prompt_ids), len(all_ids)))
        in_full = self._show(all_ids[index]) if index < len(all_ids) else "missing"
        return (
            f"the prompt's tokens are not a prefix of the conversation's: token {index} is "
            f"{self._show(prompt_ids[index])} in the prompt alone and {in_full} in the conversation"
        )

    def _show(self, token_id: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id})"


def _forms(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """The conversation as templates may want it, the usual form first.

    Some read a call's arguments as text, and some an empty content beside calls. That comes last: DeepSeek's templates
    write a call only beside a null.
    """
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    has_none = any(message["content"] is None for message in messages)
    for content in (None, "")[: 2 if has_none else 1]:
        for as_text in (False, True)[: 2 if calls else 1]:
            yield [_as_template_reads(message, as_text, content) for message in messages]


def _as_template_reads(message: Message, arguments_as_text: bool, no_content: str | None) -> dict[str, Any]:
    found = dict(message)
    if found["content"] is None:
        found["content"] = no_content
    if "reasoning_content" in found:
        found |= dict.fromkeys(THOUGHTS, found["reasoning_content"])
    if arguments_as_text and "tool_calls" in found:
        found["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in found["tool_calls"]
        ]
    return found


def is_text_template(template: str | None) -> TypeGuard[str]:
    """Whether data.template is a text with {prompt}: not the tokenizer's chat template (None), and not Jinja."""
    return template is not None and "{%" not in template and "{{" not in template


def chat_template_of(template: str | None, tokenizer: PreTrainedTokenizerBase, end: str) -> str | None:
    """The run's template as a chat template: data.template, or else the tokenizer's."""
    if template is None:
        return cast(str | None, tokenizer.chat_template)
    if not is_text_template(template):
        return template
    bos = cast(str | None, tokenizer.bos_token)
    adds_bos = bos is not None and cast(list[int], tokenizer("x")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return text_as_jinja(template, cast(str, bos) if adds_bos else "", end)


def text_as_jinja(text: str, bos: str, end: str) -> str:
    """Converts a text template to a chat template that gives the same tokens for one turn.

    As in `Renderer`, trailing spaces belong to the response: the template's own and those of the prompt before them.
    """

    def contents(role: str) -> str:
        return f"(messages | selectattr('role', 'equalto', '{role}') | map(attribute='content') | join('\\n'))"

    slots = {"{prompt}": contents("user"), "{system}": contents("system")}
    pieces = [slots.get(piece) or _literal(piece) for piece in re.split(r"(\{system\}|\{prompt\})", text) if piece]
    response = f"{{{{ filled[prompt | length:] ~ messages[-1]['content'] ~ {_literal(end)} }}}}"
    return (
        f"{{% set filled = {' ~ '.join(pieces)} %}}{{% set prompt = filled.rstrip(' ') %}}"
        f"{{{{ {_literal(bos)} ~ prompt }}}}{{% if messages[-1]['role'] == 'assistant' %}}{response}{{% endif %}}"
    )


def _literal(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)
