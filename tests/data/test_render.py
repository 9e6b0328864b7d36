"""The token contract, for widely used chat templates."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from sparring.data.read import BadRow
from sparring.data.render import Renderer, chat_template_of
from sparring.errors import UserError
from sparring.types import Example, Message, Rendered

SPECIAL = [
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>",
    "<|user|>", "<|assistant|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "[INST]", "[/INST]",
]  # fmt: skip
CORPUS = ["Hello there, how are you today?", "The answer is 42. Yes, it is!", "### Instruction: ### Response: "] * 20

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<s>[INST] ' + (sys if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + "
    "'<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% if m['role'] == 'assistant' %}{% set r = 'model' %}{% else %}{% set r = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + r + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '</s>' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEMPLATES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama-2": (LLAMA2, "</s>"),
    "llama-3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "zephyr": (ZEPHYR, "</s>"),
    "phi-3, with a second end": (PHI3, "<|end|>"),
    "bare, without an end": (BARE, "</s>"),
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS, BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def renderer(tokenizer: PreTrainedTokenizerFast, template: str | None, **settings: object) -> Renderer:
    options: dict[str, object] = {"end_token": None, "max_length": 200, "max_response": None, **settings}
    return Renderer(tokenizer, template=template, **options)  # type: ignore[arg-type]


def example(answer: str = "Yes, it is!", *before: tuple[str, str]) -> Example:
    turns = before or (("user", "Hello there"),)
    messages = [Message(role=role, content=text) for role, text in (*turns, ("assistant", answer))]
    return Example("id", 7, tuple(messages))


def text(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_a_strict_prefix_and_the_response_ends_with_its_token(
    tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    template, end = TEMPLATES[name]
    render = renderer(tokenizer, template)
    row = render(example())
    assert tokenizer.convert_ids_to_tokens(render.end.id) == end
    assert row.real_ids[-1] == render.end.id
    assert (row.real_ids == render.end.id).sum() == 1, "one end, and nothing after it"
    assert row.real_finish == "stop"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello there"}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    assert text(tokenizer, row.prompt_ids) == prompt == row.prompt
    assert "Yes, it is!" in text(tokenizer, row.real_ids)
    assert "Hello" not in text(tokenizer, row.real_ids), "no user token is scored"


@pytest.mark.parametrize("name", ["chatml", "llama-2", "llama-3", "zephyr"])
def test_system_and_earlier_turns_are_in_the_prompt(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    before = (("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi."), ("user", "how are you"))
    row = renderer(tokenizer, TEMPLATES[name][0])(example("The answer", *before))
    prompt, answer = text(tokenizer, row.prompt_ids), text(tokenizer, row.real_ids)
    assert all(part in prompt for part in ("Be brief.", "Hello", "Hi.", "how are you"))
    assert not any(part in answer for part in ("brief", "Hi.", "how are"))


THINKING = (
    "{% for m in messages %}{% set said = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + EMPTY + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + OPENED }}{% endif %}"
)


def thinking(*, empty: bool = False, opened: str = "") -> str:
    """A reasoning model's template: `empty` writes an empty block before the last response; `opened` opens the block in
    the prompt."""
    block = "('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '')" if empty else "''"
    return THINKING.replace("EMPTY", block).replace("OPENED", repr(opened))


def test_reasoning_is_part_of_the_response_and_dropped_from_earlier_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    before = (("user", "Hello"), ("assistant", "<think>so?</think>Hi."), ("user", "how are you"))
    row = renderer(tokenizer, thinking())(example("<think>well</think>Yes", *before))
    assert text(tokenizer, row.real_ids) == "<think>well</think>Yes<|im_end|>"
    assert "Hi." in text(tokenizer, row.prompt_ids) and "so?" not in text(tokenizer, row.prompt_ids)


def test_an_empty_reasoning_block_is_scored_with_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    """The prompt does not contain the block, so the model must write it."""
    row = renderer(tokenizer, thinking(empty=True))(example("Yes"))
    assert text(tokenizer, row.real_ids) == "<think>\n\n</think>\n\nYes<|im_end|>"


def test_a_prompt_that_opens_the_reasoning_needs_responses_that_have_it(tokenizer: PreTrainedTokenizerFast) -> None:
    """A row without reasoning is skipped with the reason, never truncated to fit."""
    render = renderer(tokenizer, thinking(opened="<think>"))
    row = render(example("<think>well</think>Yes"))
    assert text(tokenizer, row.prompt_ids).endswith("assistant\n<think>")
    assert text(tokenizer, row.real_ids) == "well</think>Yes<|im_end|>"
    with pytest.raises(BadRow, match=r"opens <think> in the prompt.*no thought.*data\.empty_thought: true"):
        render(example("Yes"))
    empty = renderer(tokenizer, thinking(opened="<think>"), empty_thought=True)(example("Yes"))
    assert text(tokenizer, empty.real_ids) == "\n</think>\n\nYes<|im_end|>"


def test_a_template_that_raises_an_error_is_reported(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(BadRow, match="System role not supported"):
        renderer(tokenizer, GEMMA)(example("Yes", ("system", "s"), ("user", "u")))


def test_a_template_that_breaks_the_prefix_is_reported_per_row(tokenizer: PreTrainedTokenizerFast) -> None:
    changing = CHATML.replace("{% for m in messages %}", "{{ messages | length }}{% for m in messages %}")
    with pytest.raises(BadRow, match="not a prefix of the conversation's: token 0 is .* in the prompt alone"):
        renderer(tokenizer, changing)(example())


def test_templates_are_sandboxed(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match=r"data\.template"):
        renderer(tokenizer, "{{ ''.__class__.__mro__ }}{{ messages }}")


def test_the_trailing_space_of_a_text_template_belongs_to_the_response(tokenizer: PreTrainedTokenizerFast) -> None:
    row = renderer(tokenizer, "### Instruction: {prompt}\n\n### Response: ")(example())
    assert text(tokenizer, row.prompt_ids) == "<s>### Instruction: Hello there\n\n### Response:"
    assert text(tokenizer, row.real_ids) == " Yes, it is!</s>"
    whole = tokenizer("### Instruction: Hello there\n\n### Response: Yes, it is!")["input_ids"]
    assert [*row.prompt_ids, *row.real_ids] == [*whole, 2], "the full text, with one BOS and one end token"


@pytest.mark.parametrize("prompt", ["Hello there ", "Hello  there   ", "Hello there", "Hello there\n ", "{{ x }} "])
@pytest.mark.parametrize("template", ["{prompt}", "{prompt} ", "Q: {prompt}\n\nA: ", '{system}"\\ {prompt}'])
def test_an_exported_text_template_gives_the_same_tokens(
    tokenizer: PreTrainedTokenizerFast, template: str, prompt: str
) -> None:
    """A prompt's trailing spaces belong to the response too, if nothing but spaces stands between the two."""
    row = renderer(tokenizer, template)(example("Yes", ("user", prompt)))
    exported = chat_template_of(template, tokenizer, "</s>")
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "Yes"}]
    for messages, ids in ((turns[:1], row.prompt_ids), (turns, [*row.prompt_ids, *row.real_ids])):
        text = tokenizer.apply_chat_template(messages, chat_template=exported, tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(ids)


def test_text_template_slots_are_filled_once(tokenizer: PreTrainedTokenizerFast) -> None:
    render = renderer(tokenizer, "{system}|{prompt}|")
    row = render(example("Yes", ("system", "say {prompt}"), ("user", "{system} x")))
    assert text(tokenizer, row.prompt_ids) == "<s>say {prompt}|{system} x|"
    with pytest.raises(BadRow, match="no {system}"):
        renderer(tokenizer, "{prompt}")(example("Yes", ("system", "s"), ("user", "u")))
    with pytest.raises(BadRow, match="several turns"):
        render(example("Yes", ("user", "u"), ("assistant", "a"), ("user", "v")))


def test_responses_that_contain_the_text_of_an_end_token_survive(tokenizer: PreTrainedTokenizerFast) -> None:
    row = renderer(tokenizer, ZEPHYR)(example("a </s> b"))
    assert text(tokenizer, row.real_ids) == "a </s> b</s>"
    row = renderer(tokenizer, CHATML)(example("He is my friend"))
    assert text(tokenizer, row.real_ids) == "He is my friend<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, "{prompt}\n"])
def test_a_truncated_response_is_marked_and_has_no_end_token(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    whole = renderer(tokenizer, template)(example("The answer is 42. " * 5))
    n = len(whole.real_ids)

    def cut(**limits: int) -> Rendered:
        return renderer(tokenizer, template, **limits)(example("The answer is 42. " * 5))

    for row in (cut(max_response=n - 1), cut(max_length=len(whole.prompt_ids) + n - 1)):
        assert row.real_finish == "length"
        assert row.real_ids.tolist() == whole.real_ids[:-1].tolist()
    assert cut(max_response=n).real_finish == "stop", "a response that just fits is not truncated"


def test_the_response_may_use_all_tokens_that_the_prompt_leaves(tokenizer: PreTrainedTokenizerFast) -> None:
    row = renderer(tokenizer, "{prompt}:", max_length=40)(example("The answer is 42. " * 30))
    assert len(row.prompt_ids) + len(row.real_ids) == 40
    with pytest.raises(BadRow, match=r"has \d+ tokens and leaves no room for a response \(train.max_length is 40\)"):
        renderer(tokenizer, "{prompt}:", max_length=40)(example("Yes", ("user", "Hello there " * 40)))


def test_settings_that_cannot_work_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no chat template. Set a text"):
        renderer(tokenizer, None)
    with pytest.raises(UserError, match="has no {prompt}"):
        renderer(tokenizer, "### Response:")
    with pytest.raises(UserError, match="no token '<nope>'"):
        renderer(tokenizer, CHATML, end_token="<nope>")
    render = renderer(tokenizer, "{prompt}", end_token="<s>")
    assert render(example()).real_ids[-1] == 1, "the end token that the recipe sets"
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="end token"):
        renderer(bare, "{prompt}")


def test_one_bos_token(tokenizer: PreTrainedTokenizerFast) -> None:
    for template in (LLAMA3, "{prompt}"):
        ids = renderer(tokenizer, template)(example()).prompt_ids.tolist()
        assert ids.count(1) == 1 and ids[0] == 1
    assert 1 not in renderer(tokenizer, CHATML)(example()).prompt_ids, "no BOS where the template has none"


def test_each_template_has_its_own_digest(tokenizer: PreTrainedTokenizerFast) -> None:
    digests = {renderer(tokenizer, template).template_digest for template in (CHATML, ZEPHYR, "{prompt}", "{prompt} ")}
    assert len(digests) == 4
