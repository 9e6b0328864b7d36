"""The Modelfile: its template renders what the chat template does, by a reading of Go's template language as Jinja."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest

from sparring.commands.export.modelfile import modelfile
from sparring.data.render import Renderer
from sparring.model.load import load_tokenizer
from sparring.recipe.schema import Generate

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '[system]\nBe \"kind\".[end]\n' }}{% endif %}{% for m in messages %}"
    "{{ '[' + m.role + ']\n' + m.content + '[end]\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '{{' + m.role + '}}: ' + m.content }}"
    "{% if m.role == 'assistant' %}</s>{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant says \"' }}{% endif %}"
)
GOES_BY_LENGTH = "{% if messages | length > 4 %}[long]{% endif %}" + PLAIN
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + PLAIN


@pytest.fixture(scope="module")
def make_renderer(tiny: Path) -> Callable[[str | None], Renderer]:
    tokenizer = load_tokenizer(tiny / "model")
    options: dict[str, Any] = {"end_token": None, "max_length": 100, "max_response": None}
    return lambda template: Renderer(tokenizer, template=template, **options)


def as_ollama(text: str, messages: list[dict[str, str]]) -> str:
    """The prompt that Ollama makes of messages: the system prompt of SYSTEM unless there is one, then TEMPLATE."""
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    system = re.findall(r'^SYSTEM """(.*?)"""$', text, re.DOTALL | re.MULTILINE)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system[0]}, *messages]
    ends = []

    def jinja(action: re.Match[str]) -> str:
        words = action[1]
        if words == "range .Messages":
            ends.append("endfor")
            return "{% for m in messages %}"
        if words.startswith("if eq .Role "):
            ends.append("endif")
            return f"{{% if m.role == {words.removeprefix('if eq .Role ')} %}}"
        names = {".Content": "m.content", ".Prompt": "prompt", ".System": "system"}
        return f"{{% {ends.pop()} %}}" if words == "end" else f"{{{{ {names.get(words, words)} }}}}"

    environment = jinja2.Environment(keep_trailing_newline=True, autoescape=False)
    said = {m["role"]: m["content"] for m in messages}
    names = {"messages": messages, "prompt": said.get("user", ""), "system": said.get("system", "")}
    return environment.from_string(re.sub(r"\{\{ (.*?) \}\}", jinja, template)).render(names)


def talk(letters: str) -> list[dict[str, str]]:
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[letter], "content": f"{letter} says {n}.\n\nYes?"} for n, letter in enumerate(letters)]


@pytest.mark.parametrize("template", [None, CHATML, PLAIN])
def test_the_template_of_a_modelfile_writes_the_same_prompts(
    make_renderer: Callable[[str | None], Renderer], template: str | None
) -> None:
    renderer = make_renderer(template)
    text = modelfile(renderer, Generate(), [3], 100)
    bos = renderer.tokenizer.bos_token or ""
    for letters in ("u", "su", "uau", "suau", "uauauau"):
        expected = renderer.tokenizer.apply_chat_template(
            talk(letters), chat_template=template, add_generation_prompt=True, tokenize=False
        )
        assert as_ollama(text, talk(letters)) == expected.removeprefix(bos), letters
    assert ("SYSTEM" in text) == (template is not None and "kind" in template)


def test_a_text_template(make_renderer: Callable[[str | None], Renderer]) -> None:
    text = modelfile(make_renderer("{system}\n### {prompt} }}\n\n### Answer:  "), Generate(), [3], 100)
    assert as_ollama(text, talk("su")) == "s says 0.\n\nYes?\n### u says 1.\n\nYes? }}\n\n### Answer:"


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (GOES_BY_LENGTH, "what it writes around a turn depends on other turns"),
        (NO_SYSTEM, "the chat template raised an error: no system turn"),
        (PLAIN.replace("m.content }}", "m.content[:2] }}"), "it leaves out turns, or repeats them"),
        (CHATML.replace("[system]", "[hint]"), "what it writes without a system turn is no system turn"),
    ],
)
def test_a_template_that_is_more_than_turns_is_said(
    make_renderer: Callable[[str | None], Renderer], template: str, why: str
) -> None:
    """And prompts pass unchanged, instead of with the template that Ollama would guess."""
    text = modelfile(make_renderer(template), Generate(), [3], 100)
    assert f"cannot express this chat template: {why}" in text and 'TEMPLATE """{{ .Prompt }}"""\n' in text


def test_end_tokens_and_sampling(make_renderer: Callable[[str | None], Renderer]) -> None:
    lines = modelfile(make_renderer(None), Generate(temperature=0.7, top_p=0.9), [3, 2], 512).splitlines()
    tokens = [make_renderer(None).tokenizer.convert_ids_to_tokens(id) for id in (3, 2)]
    assert [line for line in lines if line.startswith("PARAMETER stop")] == [f'PARAMETER stop "{t}"' for t in tokens]
    assert {"PARAMETER temperature 0.7", "PARAMETER top_p 0.9", "PARAMETER num_ctx 512", "FROM ./model.gguf"} <= {
        *lines
    }
    greedy = modelfile(make_renderer(None), Generate(temperature=0), [3], 512)
    assert "PARAMETER temperature 0" in greedy and "top_p" not in greedy


def test_a_real_template(make_renderer: Callable[[str | None], Renderer]) -> None:
    """Its default system prompt becomes SYSTEM."""
    trl = pytest.importorskip("trl", reason="TRL is not installed; it has the templates of models")
    folder = Path(trl.__file__).parent / "chat_templates"
    qwen = modelfile(make_renderer((folder / "qwen2_5.jinja").read_text(encoding="utf-8")), Generate(), [3], 100)
    assert 'SYSTEM """You are Qwen, created by Alibaba Cloud. You are a helpful assistant."""' in qwen
