"""Renders examples as token ids.

Every rendered row keeps three promises:
- The prompt ids are exactly what the generator receives.
- Prompt ids + response ids are the tokens of the full conversation, so the prompt is a strict prefix of it.
- The last response token is the end token that the model must emit, unless the response was truncated, which is marked.
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

PROBE = "sparring"
"""A response whose end is easy to find in a rendered conversation."""


@dataclass(frozen=True)
class EndOfTurn:
    """The token that ends a response."""

    id: int
    is_in_template: bool
    num_tokens_after: int  # what the template writes after it


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
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_response = max_response
        is_jinja = template is not None and ("{%" in template or "{{" in template)
        self.text_template = None if is_jinja else template
        self.chat_template = template if is_jinja else None
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
        prompt, prompt_ids, response_ids = render(example.messages)
        rejected_ids = list[int]()
        if example.rejected is not None:
            rejected = Message(role="assistant", content=example.rejected)
            _, _, rejected_ids = render([*example.messages[:-1], rejected])
        if not prompt_ids:
            raise BadRow("the prompt has no tokens")
        available = self.max_length - len(prompt_ids)
        if available < 1:
            raise BadRow(
                f"the prompt has {len(prompt_ids)} tokens and leaves no room for a response (train.max_length is "
                f"{self.max_length})"
            )
        max_tokens = min(available, self.max_response or available)
        return Rendered(
            id=example.id,
            row=example.row,
            prompt_ids=np.array(prompt_ids, dtype=np.int32),
            real_ids=np.array(response_ids[:max_tokens], dtype=np.int32),
            real_finish="stop" if len(response_ids) <= max_tokens else "length",
            prompt=prompt,
            real=example.answer,
            rejected_ids=np.array(rejected_ids[:max_tokens], dtype=np.int32),
        )

    # White space that the template writes after the end token ("<|im_end|>\n") is not part of the response: a model
    # stops at the end token, and real and generated responses must have the same form.
    def _render_chat(self, messages: Sequence[Message]) -> tuple[str, list[int], list[int]]:
        prompt = self._apply(messages[:-1], add_generation_prompt=True)
        prompt_ids = self._tokenize(prompt)
        all_ids = self._tokenize(self._apply(messages))
        if all_ids[: len(prompt_ids)] != prompt_ids:
            raise BadRow(self._first_difference(prompt_ids, all_ids))
        response = all_ids[len(prompt_ids) :]
        if not self.end.is_in_template:
            return prompt, prompt_ids, [*response, self.end.id]
        response = response[: len(response) - self.end.num_tokens_after]
        if not response or response[-1] != self.end.id:
            raise BadRow(f"the template does not end this response with {self._show(self.end.id)}")
        return prompt, prompt_ids, response

    # Trailing spaces of a text template belong to the response, where tokenizers put them: "Response: Yes" becomes
    # "Response", ":", " Yes".
    def _render_text(self, messages: Sequence[Message]) -> tuple[str, list[int], list[int]]:
        assert self.text_template is not None
        *before, last = messages
        system = [m["content"] for m in before if m["role"] == "system"]
        users = [m["content"] for m in before if m["role"] == "user"]
        if len(before) != len(system) + 1 or len(users) != 1:
            raise BadRow("the conversation has several turns, but a text template takes one (set data.turns: first)")
        if system and "{system}" not in self.text_template:
            raise BadRow("the row has a system turn, but data.template has no {system}")
        values = {"system": "\n".join(system), "prompt": users[0]}
        filled = re.sub(r"\{(system|prompt)\}", lambda slot: values[slot[1]], self.text_template)
        prompt = filled.rstrip(" ")
        response = filled[len(prompt) :] + last["content"]
        prompt_ids, all_ids = self._tokenize_with_bos(prompt), self._tokenize_with_bos(prompt + response)
        if all_ids[: len(prompt_ids)] != prompt_ids:
            raise BadRow(self._first_difference(prompt_ids, all_ids))
        return prompt, prompt_ids, [*all_ids[len(prompt_ids) :], self.end.id]

    def _apply(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            return self._bounded("render", list(map(dict, messages)), add_generation_prompt)
        except CallFailed as error:
            raise BadRow(f"the chat template raised an error: {error}") from error
        except LimitExceeded as error:
            raise UserError(
                f"data.template: the chat template {error} on one conversation. Do not trust the model folder that it "
                "comes from. Set data.template to a template of your own."
            ) from error

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """Runs in the child process."""
        return cast(
            str,
            self.tokenizer.apply_chat_template(
                messages,
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
        """`end_token` if it is set, else the first special token after a response, else the EOS token."""
        wanted = None
        if end_token is not None:
            wanted = self.tokenizer.get_vocab().get(end_token)
            if wanted is None:
                raise UserError(f"data.end_token: the tokenizer has no token {end_token!r}.")
        if self.text_template is None:
            turns = [Message(role="user", content="?"), Message(role="assistant", content=PROBE)]
            try:
                tail = self._tokenize(self._apply(turns).rpartition(PROBE)[2])
            except BadRow as problem:
                raise UserError(f"data.template: {problem}") from problem
            special = set(self.tokenizer.all_special_ids)
            special |= {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
            for index, token in enumerate(tail):
                if token == wanted or (wanted is None and token in special):
                    return EndOfTurn(token, is_in_template=True, num_tokens_after=len(tail) - index - 1)
        end = wanted if wanted is not None else self.tokenizer.eos_token_id
        if end is None:
            raise UserError("data.end_token: neither the template nor the tokenizer has an end token. Set one.")
        return EndOfTurn(cast(int, end), is_in_template=False, num_tokens_after=0)

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


def chat_template_of(template: str | None, tokenizer: PreTrainedTokenizerBase, end: str) -> str | None:
    """The run's template as a chat template: data.template, or else the tokenizer's."""
    if template is None:
        return cast(str | None, tokenizer.chat_template)
    if "{%" in template or "{{" in template:
        return template
    bos = cast(str | None, tokenizer.bos_token)
    adds_bos = bos is not None and cast(list[int], tokenizer("x")["input_ids"])[:1] == [tokenizer.bos_token_id]
    return text_as_jinja(template, cast(str, bos) if adds_bos else "", end)


def text_as_jinja(text: str, bos: str, end: str) -> str:
    """Converts a text template to a chat template that gives the same tokens for one turn."""
    head = text.rstrip(" ")
    trailing_space = text[len(head) :]

    def literal(value: str) -> str:
        return f"{{{{ {json.dumps(value, ensure_ascii=False)} }}}}" if value else ""

    def contents(role: str) -> str:
        return f"messages | selectattr('role', 'equalto', '{role}') | map(attribute='content') | join('\\n')"

    slots = {"{prompt}": f"{{{{ {contents('user')} }}}}", "{system}": f"{{{{ {contents('system')} }}}}"}
    body = "".join(slots.get(piece) or literal(piece) for piece in re.split(r"(\{system\}|\{prompt\})", head))
    response = f"{literal(trailing_space)}{{{{ messages[-1]['content'] }}}}{literal(end)}"
    return f"{literal(bos)}{body}{{% if messages[-1]['role'] == 'assistant' %}}{response}{{% endif %}}"
