"""Random conversations through real chat templates, as TRL ships them.

Whatever is scored is what the template would have written, and whatever is dropped is said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from transformers import PreTrainedTokenizerFast

from sparring.data.formats import detect_format, examples, prompt_key
from sparring.data.read import BadRow
from sparring.data.render import Renderer
from sparring.types import Example, Rendered

FOLDER = Path(trl.__file__).parent / "chat_templates"
TOKENS = re.compile(r"<\|[\w▁]+?\|>|<｜[\w▁]+?｜>|<(?:start|end)_of_turn>|\[gMASK\]|<sop>|<eos>")


WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 and Qwen split a text before its bytes are merged."""


class Template(NamedTuple):
    end: str  # of an answer
    declared: tuple[str, ...] = ()  # other end tokens of the model's generation_config.json
    opens: bool = False  # a thinking block in the prompt
    end_of_call: str | None = None
    calls: bool = True  # whether it writes tool calls


TEMPLATES = {
    "cohere2": Template("<|END_OF_TURN_TOKEN|>", calls=False),
    "deepseek_r1_distill": Template("<｜end▁of▁sentence｜>", opens=True),
    "deepseekv3": Template("<｜end▁of▁sentence｜>", opens=True),
    "gemma": Template("<end_of_turn>", calls=False),
    "gemma3": Template("<end_of_turn>", calls=False),
    "glm4moe": Template("<|user|>", ("<|observation|>",), end_of_call="<|observation|>"),
    "gptoss": Template("<|return|>", ("<|call|>",), end_of_call="<|call|>"),
    "lfm2": Template("<|im_end|>", calls=False),
    "llama3_1": Template("<|eot_id|>"),
    "phi3": Template("<|end|>", calls=False),
    "qwen2_5": Template("<|im_end|>"),
    "qwen3": Template("<|im_end|>"),
    "qwen3_5_think": Template("<|im_end|>", opens=True),
    "qwen3_instruct_2507": Template("<|im_end|>"),
}


class Open(NamedTuple):
    tokenizer: PreTrainedTokenizerFast
    render: Renderer


@cache
def load(name: str, empty_thought: bool = True) -> Open:
    """A byte tokenizer with the template's tokens, which joins two line feeds as Qwen's and Llama's do."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    known = TEMPLATES[name]
    special = sorted({*TOKENS.findall(text), known.end, *known.declared} - {""})
    vocabulary = {letter: index for index, letter in enumerate([*sorted(ByteLevel.alphabet()), "ĊĊ"])}
    backend = Tokenizer(BPE(vocabulary, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = Sequence([Split(Regex(WORDS), "isolated"), ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<|endoftext|>", *special])
    backend.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")
    tokenizer.chat_template = text
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", known.end, *known.declared])
    render = Renderer(
        tokenizer, template=None, end_token=None, max_length=100_000, max_response=None, declared_ends=ends,
        empty_thought=empty_thought,
    )  # fmt: skip
    return Open(tokenizer, render)


def truth(opened: Open, example: Example, messages: Iterable[dict[str, Any]], *, asks: bool) -> str:
    """What the template writes, with arguments and empty contents in the first form that it takes."""
    failed: Exception | None = None
    for nothing in (None, ""):
        for as_text in (False, True):
            given: list[dict[str, Any]] = json.loads(json.dumps(list(messages)))
            for message in given:
                message["content"] = nothing if message["content"] is None else message["content"]
                if "reasoning_content" in message:
                    message["thinking"] = message["reasoning_content"]
                for call in message.get("tool_calls", []) if as_text else []:
                    call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
            try:
                return opened.tokenizer.apply_chat_template(  # type: ignore[return-value]
                    given, tools=list(example.tools) or None, add_generation_prompt=asks, tokenize=False
                )
            except Exception as error:  # whatever a template raises
                failed = error
    raise AssertionError(f"the template fails: {failed}")


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Every word is unique, so that what is missing can be told."""
    numbers = count(1)

    def words(kind: str) -> str:
        spice = draw(st.sampled_from(["", ' and "more"', "\nnew line", " é ☃ <b>", " \\n {x}"]))
        return f"{kind}{next(numbers)}w{spice} {kind}{next(numbers)}w"

    def assistant(**more: object) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": "assistant", "content": words("said"), **more}
        thought = draw(st.sampled_from(["", "", "field", "inside"]))
        if thought == "field":
            turn["reasoning_content"] = words("thought")
        elif thought == "inside" and turn["content"]:
            turn["content"] = f"<think>\n{words('thought')}\n</think>\n\n{turn['content']}"
        turn |= draw(st.sampled_from([{}, {}, {}, {"weight": 0}, {"weight": 1}, {"train": False}, {"avatar": "x.png"}]))
        return turn

    messages = [{"role": "system", "content": words("system")}] if draw(st.booleans()) else []
    has_tools = draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": words("asked")})
        if has_tools and draw(st.booleans()):
            calls = [
                {"function": {"name": f"name{next(numbers)}w", "arguments": {f"key{next(numbers)}w": words("value")}}}
                for _ in range(draw(st.sampled_from([1, 1, 2])))
            ]
            messages.append(assistant(tool_calls=calls, **draw(st.sampled_from([{}, {"content": None}]))))
            messages += [{"role": "tool", "content": words("result"), "name": c["function"]["name"]} for c in calls]
        messages.append(assistant())
    tool = {"name": f"tool{next(numbers)}w", "description": "d", "parameters": {"type": "object", "properties": {}}}
    return {"messages": messages, **({"tools": [{"type": "function", "function": tool}]} if has_tools else {})}


LABELS = {
    "system": "a turn of the system",
    "asked": "a turn of the user",
    "said": "a turn of the assistant",
    "result": "a turn of the tool",
    "thought": "the thought of an earlier turn",
}


def said_words(value: object) -> Iterator[str]:
    if isinstance(value, dict | list):
        for one in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from said_words(one)
    else:
        yield from re.findall(r"[a-z]+\d+w", str(value))


def check(name: str, example: Example, row: Rendered) -> None:
    opened, known = load(name), TEMPLATES[name]
    prompt = opened.tokenizer.decode(row.prompt_ids)
    *before, last = example.messages
    assert prompt == truth(opened, example, before, asks=True), "the generator reads what the template writes"
    whole = truth(opened, example, example.messages, asks=False)
    end = (known.end_of_call or known.end) if "tool_calls" in last else known.end
    response = opened.tokenizer.decode(row.real_ids)
    assert response.endswith(end) and response.count(end) == 1, "the token at which the model stops"
    if whole.startswith(prompt):
        written = whole[len(prompt) :]
        assert written.rstrip() == response.rstrip() or written + end == response or written.startswith(response)
        assert not list(said_words(written.removeprefix(response.removesuffix(end))))
    else:
        assert known.opens and prompt.endswith("<think>\n")
        thought, _, answer = response.partition("</think>")
        thoughts = [w for w in said_words(last) if w.startswith("thought")]
        assert list(said_words(thought)) == thoughts and whole.endswith(answer.lstrip("\n"))
    text = prompt + response
    missing = [word for word in said_words([list(example.messages), list(example.tools)]) if word not in text]
    expected = {LABELS[re.sub(r"\d+w", "", word)] for word in missing if not word.startswith("name")}
    assert {label.partition(", which")[0].replace("a part of ", "") for label in row.left_out} == {
        *expected,
        *example.left_out,
    }
    assert not [w for w in said_words(last) if w not in response and not w.startswith(("name", "tool"))]


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=20)
@given(row=rows())
def test_what_is_scored_is_what_the_template_writes_and_what_is_dropped_is_said(name: str, row: dict[str, Any]) -> None:
    context = [t["content"] for t in row["messages"] if t.get("weight") == 0 or t.get("train") is False]
    try:
        found = examples(row, 1, detect_format(row, {}, None, "rows"), "all")
    except BadRow as problem:
        assert "each has weight 0 or train false" in str(problem)
        return
    assert not [e for e in found if e.messages[-1]["content"] in context and e.messages[-1]["content"] is not None]
    for example in found:
        try:
            rendered = load(name).render(example)
        except BadRow as problem:
            is_plain = not example.tools and not [m for m in example.messages if m.keys() - {"role", "content"}]
            is_plain = is_plain and "<think>" not in str(example.messages) and example.messages[0]["role"] != "system"
            assert not is_plain, f"a plain conversation is refused: {problem}"
            assert re.search("raised an error|leaves out|does not end this response|not a prefix", str(problem))
        else:
            check(name, example, rendered)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}
CALLING = {
    "messages": [
        {"role": "user", "content": "Is it warm?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "20 degrees", "name": "weather"},
        {"role": "assistant", "content": "Yes, it is."},
    ],
    "tools": json.dumps([TOOL]),
}


def one(row: dict[str, Any], which: str = "last") -> list[Example]:
    return examples(row, 1, detect_format(row, {}, None, "rows"), which)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, known in TEMPLATES.items() if known.calls])
def test_calls_and_tools_are_in_the_prompt_or_the_row_is_refused(name: str) -> None:
    """DeepSeek's templates have no place for a list of tools; R1's loses a call beside which there is an answer."""
    opened = load(name)
    call, answer = one(CALLING, "all")
    if name.startswith("deepseek"):
        with pytest.raises(BadRow, match="leaves out the row's tools"):
            opened.render(answer)
        call, answer = one({"messages": CALLING["messages"]}, "all")
    row = opened.render(answer)
    assert all(part in row.prompt for part in ("weather", "Bern", "20 degrees"))
    assert row.real == "Yes, it is."
    if name not in ("deepseek_r1_distill",):
        called = opened.render(call)
        assert "Bern" in called.real and "weather" in called.real
        end = TEMPLATES[name].end_of_call or TEMPLATES[name].end
        assert opened.tokenizer.convert_ids_to_tokens(int(called.real_ids[-1])) == end


@pytest.mark.parametrize("name", [name for name, known in TEMPLATES.items() if not known.calls])
def test_a_template_without_calls_refuses_them(name: str) -> None:
    with pytest.raises(
        BadRow, match=r"leaves out (the tool calls of turn 2|the row's tools)\. Set data\.template|error"
    ):
        load(name).render(one(CALLING)[0])


def test_glm_ends_with_the_next_turn_s_token() -> None:
    """Its template writes no end: with the tokenizer's EOS one token would tell real from generated."""
    opened = load("glm4moe")
    assert opened.tokenizer.convert_ids_to_tokens(opened.render.end.id) == "<|user|>"
    alone = Renderer(opened.tokenizer, template=None, end_token=None, max_length=99, max_response=None)
    assert opened.tokenizer.convert_ids_to_tokens(alone.end.id) == "<|endoftext|>", "no file declares another one"


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"content": "Yes"}, "\n</think>\n\nYes"),
        ({"content": "Yes", "reasoning_content": "so"}, "so\n</think>\n\nYes"),
        ({"content": "<think>\nso\n</think>\n\nYes"}, "so\n</think>\n\nYes"),
        ({"content": "Yes", "thinking": "so"}, "so\n</think>\n\nYes"),
    ],
)
@pytest.mark.parametrize("name", [name for name, known in TEMPLATES.items() if known.opens])
def test_a_block_that_the_prompt_opens_is_closed(name: str, turn: dict[str, str], expected: str) -> None:
    """R1's template writes no thought at all, Qwen's an empty one whose tokens would begin in the prompt."""
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **turn}]}
    opened = load(name)
    rendered = opened.render(one(row)[0])
    assert rendered.prompt.endswith("<think>\n")
    assert opened.tokenizer.decode(rendered.real_ids) == expected + TEMPLATES[name].end


def test_a_thought_is_asked_for_where_the_template_writes_none() -> None:
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes"}]}
    with pytest.raises(BadRow, match=r"opens <think> in the prompt.*no thought.*data\.empty_thought: true"):
        load("deepseek_r1_distill", empty_thought=False).render(one(row)[0])
    assert load("qwen3_5_think", empty_thought=False).render(one(row)[0]), "this one writes an empty thought itself"


def test_a_thought_that_no_template_reads_is_refused() -> None:
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Yes", "reasoning": "so"}]}
    with pytest.raises(BadRow, match="leaves out a part of the response: 'so'"):
        load("qwen2_5").render(one(row)[0])


def test_one_question_in_other_words_has_one_key() -> None:
    asked = ["What is\n1+1?", "what is 1+1? ", "ＷＨＡＴ is 1+1?", "What\u200b is 1+1?"]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "2"}]} for q in asked]
    rows.append({**rows[0], "system": "Be brief."})
    assert len({prompt_key(one(row)[0]) for row in rows}) == 1
    assert prompt_key(one(CALLING)[0]) != prompt_key(one(rows[0])[0])
