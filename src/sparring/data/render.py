"""Examples -> token ids: the token contract.

What holds for every rendered row: the prompt ids are exactly what the generator is given; prompt ids +
response ids are the tokens of the whole conversation, so the prompt is a strict prefix of it; the last
response token is the end token that the model is to emit, unless the response was cut, which is marked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from sparring.data.bounded import BoundedProcess, CallFailed, LimitExceeded
from sparring.data.read import BadRow
from sparring.errors import UserError
from sparring.types import Example, Message, Rendered

SENTINEL = "sparring"


@dataclass(frozen=True)
class EndOfTurn:
    """The token that ends an answer, and how many tokens the template writes after it."""

    id: int
    is_in_template: bool
    num_after: int


class Renderer:
    """Renders conversations with the tokenizer's chat template, a given one, or a text with {prompt}."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None,
        end_token: str | None,
        max_length: int,
        max_response: int | None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_response = max_response
        is_jinja = template is not None and ("{%" in template or "{{" in template)
        self.text_template = None if is_jinja else template
        self.chat_template = template if is_jinja else None
        if self.text_template is not None and "{prompt}" not in self.text_template:
            raise UserError(f"data.template: {template!r} does not say where the {{prompt}} goes")
        if template is None and not tokenizer.chat_template:
            raise UserError(
                "data.template: the tokenizer has no chat template, so give a text, for example "
                r'"### Instruction: {prompt}\n\n### Response: "'
            )
        self._bounded = BoundedProcess({"render": self._render, "encode": self._encode})
        self.end = self._end_of_turn(end_token)
        bos = cast(int | None, tokenizer.bos_token_id)
        begins = bos is not None and self._tokens(SENTINEL, add_special_tokens=True)[:1] == [bos]
        self.start = [bos] if bos is not None and begins else list[int]()

    @property
    def template_digest(self) -> str:
        """Names the template that was used, so that a run cannot change it unnoticed."""
        used = self.text_template or self.chat_template or self.tokenizer.get_chat_template()
        return xxhash.xxh3_128_hexdigest(used.encode())

    def __call__(self, example: Example) -> Rendered:
        form = self._chat if self.text_template is None else self._text
        prompt, prompt_ids, response_ids = form(example.messages)
        rejected_ids = list[int]()
        if example.rejected is not None:
            worse = Message(role="assistant", content=example.rejected)
            _, _, rejected_ids = form([*example.messages[:-1], worse])
        room = self.max_length - len(prompt_ids)
        if not prompt_ids or room < 1:
            problem = "has no tokens" if not prompt_ids else f"has {len(prompt_ids)} tokens, which leaves no room"
            raise BadRow(f"the prompt {problem} (train.max_length is {self.max_length})")
        cap = min(room, self.max_response or room)
        return Rendered(
            id=example.id,
            row=example.row,
            prompt_ids=np.array(prompt_ids, dtype=np.int32),
            real_ids=np.array(response_ids[:cap], dtype=np.int32),
            real_finish="stop" if len(response_ids) <= cap else "length",
            prompt=prompt,
            real=example.answer,
            rejected_ids=np.array(rejected_ids[:cap], dtype=np.int32),
        )

    # The template's white space after the end token ("<|im_end|>\n") is not part of the answer: a model
    # that is asked to answer stops at the token, and both answers must have the same form.
    def _chat(self, messages: Sequence[Message]) -> tuple[str, list[int], list[int]]:
        prompt = self._apply(messages[:-1], add_generation_prompt=True)
        prompt_ids = self._tokens(prompt)
        all_ids = self._tokens(self._apply(messages))
        if all_ids[: len(prompt_ids)] != prompt_ids:
            raise BadRow(self._first_difference(prompt_ids, all_ids))
        response = all_ids[len(prompt_ids) :]
        if not self.end.is_in_template:
            return prompt, prompt_ids, [*response, self.end.id]
        response = response[: len(response) - self.end.num_after]
        if not response or response[-1] != self.end.id:
            raise BadRow(f"the template does not end this answer with {self._show(self.end.id)}")
        return prompt, prompt_ids, response

    # Spaces at the end of a text template go to the answer, where tokenizers keep them: "Response: Yes"
    # is the tokens "Response", ":", " Yes".
    def _text(self, messages: Sequence[Message]) -> tuple[str, list[int], list[int]]:
        assert self.text_template is not None
        *before, last = messages
        system = [m["content"] for m in before if m["role"] == "system"]
        users = [m["content"] for m in before if m["role"] == "user"]
        if len(before) != len(system) + 1 or len(users) != 1:
            raise BadRow(
                "the conversation has several turns, and the text template has room for one (data.turns: first)"
            )
        if system and "{system}" not in self.text_template:
            raise BadRow("the row has a system turn, and data.template has no {system}")
        values = {"system": "\n".join(system), "prompt": users[0]}
        filled = re.sub(r"\{(system|prompt)\}", lambda slot: values[slot[1]], self.text_template)
        prompt = filled.rstrip(" ")
        answer = filled[len(prompt) :] + last["content"]
        prompt_ids, all_ids = self._with_start(prompt), self._with_start(prompt + answer)
        if all_ids[: len(prompt_ids)] != prompt_ids:
            raise BadRow(self._first_difference(prompt_ids, all_ids))
        return prompt, prompt_ids, [*all_ids[len(prompt_ids) :], self.end.id]

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._bounded("render", list(map(dict, messages)), add_generation_prompt)
        except CallFailed as refusal:
            raise BadRow(f"the chat template refuses it: {refusal}") from refusal
        except LimitExceeded as problem:
            raise UserError(
                f"data.template: the chat template {problem} on one conversation and was ended. Do not trust the "
                "folder that it came from; give data.template one of your own"
            ) from problem

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """In the child process."""
        return cast(
            str,
            self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            ),
        )

    def _tokens(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        try:
            return self._bounded("encode", text, add_special_tokens)
        except (CallFailed, LimitExceeded) as problem:
            raise UserError(
                f"model: the tokenizer in {self.tokenizer.name_or_path} {_said(problem)} on a text of {len(text):,} "
                "characters. Do not trust its tokenizer.json; download it again from where you know it"
            ) from problem

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """In the child process."""
        return cast(list[int], self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def _with_start(self, text: str) -> list[int]:
        """Tokens of a plain text, begun with the start token if the tokenizer begins texts with one."""
        return self.start + self._tokens(text)

    def _end_of_turn(self, end_token: str | None) -> EndOfTurn:
        wanted = None
        if end_token is not None:
            wanted = self.tokenizer.get_vocab().get(end_token)
            if wanted is None:
                raise UserError(f"data.end_token: the tokenizer has no token {end_token!r}")
        if self.text_template is None:
            turns = [Message(role="user", content="?"), Message(role="assistant", content=SENTINEL)]
            try:
                tail = self._tokens(self._apply(turns).rpartition(SENTINEL)[2])
            except BadRow as problem:
                raise UserError(f"data.template: {problem}") from problem
            special = set(self.tokenizer.all_special_ids)
            special |= {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            for index, token in enumerate(tail):
                if token == wanted or (wanted is None and token in special):
                    return EndOfTurn(token, is_in_template=True, num_after=len(tail) - index - 1)
        end = wanted if wanted is not None else self.tokenizer.eos_token_id
        if end is None:
            raise UserError("data.end_token: neither the template nor the tokenizer has an end token; name one")
        return EndOfTurn(cast(int, end), is_in_template=False, num_after=0)

    def _first_difference(self, prompt_ids: list[int], all_ids: list[int]) -> str:
        pairs = enumerate(zip(prompt_ids, all_ids, strict=False))
        at = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(prompt_ids), len(all_ids)))
        there = self._show(all_ids[at]) if at < len(all_ids) else "nothing"
        return (
            f"the prompt's tokens are not a prefix of the whole: token {at} is {self._show(prompt_ids[at])} in the "
            f"prompt alone and {there} in the whole conversation"
        )

    def _show(self, token_id: int) -> str:
        return f"{self.tokenizer.convert_ids_to_tokens(token_id)!r} ({token_id})"


def _said(problem: CallFailed | LimitExceeded) -> str:
    return f"{problem} and was ended" if isinstance(problem, LimitExceeded) else f"broke down ({problem})"


def chat_template_of(template: str | None, tokenizer: PreTrainedTokenizerBase, end: str) -> str | None:
    """The template of a run as a chat template: its own, or the tokenizer's."""
    if template is None:
        return cast(str | None, tokenizer.chat_template)
    if "{%" in template or "{{" in template:
        return template
    bos = cast(str | None, tokenizer.bos_token)
    begins = bos is not None and cast(list[int], tokenizer("x")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return text_as_jinja(template, cast(str, bos) if begins else "", end)


def text_as_jinja(text: str, bos: str, end: str) -> str:
    """A text with {prompt} as a chat template: the same tokens for one turn, spaces before the answer included."""
    head = text.rstrip(" ")
    space = text[len(head) :]

    def literal(words: str) -> str:
        return f"{{{{ {json.dumps(words, ensure_ascii=False)} }}}}" if words else ""

    def turns(role: str) -> str:
        return f"messages | selectattr('role', 'equalto', '{role}') | map(attribute='content') | join('\\n')"

    slots = {"{prompt}": f"{{{{ {turns('user')} }}}}", "{system}": f"{{{{ {turns('system')} }}}}"}
    body = "".join(slots.get(piece) or literal(piece) for piece in re.split(r"(\{system\}|\{prompt\})", head))
    answer = f"{literal(space)}{{{{ messages[-1]['content'] }}}}{literal(end)}"
    return f"{literal(bos)}{body}{{% if messages[-1]['role'] == 'assistant' %}}{answer}{{% endif %}}"
