"""Writes an Ollama Modelfile: the chat template in Ollama's own language, end tokens and sampling settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import cast

from sparring.data.read import BadRow
from sparring.data.render import Renderer
from sparring.recipe.schema import Generate
from sparring.types import Message

SAID = {"system": "Lorem1", "user": "Ipsum2", "assistant": "Dolor3"}
"""What each role says in the conversations that show a template's text around it."""
CONVERSATIONS = ("u", "uau", "uauau", "su", "suau")
"""Conversations, by first letters of roles, in which a translation is compared with the template."""

HEAD = """# Convert the model first: convert_hf_to_gguf.py . --outfile model.gguf --outtype bf16
# Then: ollama create NAME -f Modelfile
FROM ./model.gguf
"""
UNTRANSLATED = """# Ollama's template language cannot express this chat template: {why}.
# Prompts pass unchanged. Render them with chat_template.jinja, or serve the model with llama-server --jinja.
"""


def modelfile(renderer: Renderer, settings: Generate, end_ids: Sequence[int], max_length: int) -> str:
    """A Modelfile for the GGUF file of an exported model. Ollama adds the BOS token itself."""
    try:
        template = _translate(renderer)
    except BadRow as problem:
        template = UNTRANSLATED.format(why=" ".join(str(problem).split())) + 'TEMPLATE """{{ .Prompt }}"""\n'
    parameters: dict[str, object] = {"num_ctx": max_length, "temperature": settings.temperature, "repeat_penalty": 1}
    if settings.temperature > 0:
        parameters |= {"top_p": settings.top_p, "top_k": 0, "min_p": 0}
    stops = cast(list[str], renderer.tokenizer.convert_ids_to_tokens(list(end_ids)))
    lines = [f"PARAMETER {name} {value}\n" for name, value in parameters.items()]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}\n" for stop in stops]
    return "".join([HEAD, template, *lines])


def _translate(renderer: Renderer) -> str:
    """TEMPLATE, and SYSTEM if the chat template has a default. Raises `BadRow` if turns are not plain text around
    what is said."""
    if renderer.text_template is not None:
        slots = {"{prompt}": "{{ .Prompt }}", "{system}": "{{ .System }}"}
        pieces = re.split(r"(\{system\}|\{prompt\})", renderer.text_template.rstrip(" "))
        return f'TEMPLATE """{"".join(slots.get(piece) or _quoted(piece) for piece in pieces)}"""\n'
    around, prompt = _find_turns(renderer)
    default = _find_default_system(renderer, around)
    for roles in CONVERSATIONS:
        said = SAID if "s" in roles or default is None else SAID | {"system": default}
        written = roles if said is SAID else f"s{roles}"
        turns = [role for letter in written for role in SAID if role[0] == letter]
        text = "".join(said[role].join(around[role]) for role in turns)
        if text + prompt != _render(renderer, roles, add_generation_prompt=True):
            raise BadRow(f"what it writes around a turn depends on other turns, as in {', '.join(turns)}")
    branches = [
        f'{{{{ if eq .Role "{role}" }}}}{_quoted(before)}{{{{ .Content }}}}{_quoted(after)}{{{{ end }}}}'
        for role, (before, after) in around.items()
    ]
    template = f'TEMPLATE """{{{{ range .Messages }}}}{"".join(branches)}{{{{ end }}}}{_quoted(prompt)}"""\n'
    return template if default is None else f'{template}SYSTEM """{default}"""\n'


def _find_turns(renderer: Renderer) -> tuple[dict[str, tuple[str, str]], str]:
    """({role: text before and after what it says}, text that asks for a response), from a conversation cut at turns."""
    whole = _render(renderer, "suau")
    try:
        first, between, answered, again, after_user = re.split("|".join(SAID.values()), whole)
    except ValueError:
        raise BadRow("it leaves out turns, or repeats them") from None
    after_answer = _render(renderer, "sua").rpartition(SAID["assistant"])[2]
    before_user = again.removeprefix(after_answer)
    around = {
        "system": (first, between.removesuffix(before_user)),
        "user": (before_user, after_user),
        "assistant": (answered.removeprefix(after_user), after_answer),
    }
    return around, _render(renderer, "suau", add_generation_prompt=True).removeprefix(whole)


def _find_default_system(renderer: Renderer, around: Mapping[str, tuple[str, str]]) -> str | None:
    """What the system says if a conversation has no system turn; None if it says nothing."""
    text = _render(renderer, "u")
    before, after = around["system"]
    turn = SAID["user"].join(around["user"])
    if text == turn:
        return None
    default = text.removeprefix(before).removesuffix(after + turn)
    if f"{before}{default}{after}{turn}" != text or '"""' in default or default.endswith('"'):
        raise BadRow("what it writes without a system turn is no system turn")
    return default


def _render(renderer: Renderer, roles: str, *, add_generation_prompt: bool = False) -> str:
    turns = [Message(role=role, content=SAID[role]) for letter in roles for role in SAID if role[0] == letter]
    text = renderer.apply_template(turns, add_generation_prompt=add_generation_prompt)
    return text.removeprefix(cast(str | None, renderer.tokenizer.bos_token) or "")


def _quoted(text: str) -> str:
    """Text as a Go template and a Modelfile's triple quotes hold it."""
    return re.sub(r'\{\{|\}\}|"""|"\Z', lambda found: f"{{{{ {json.dumps(found[0])} }}}}", text)
