"""Bad model folders and tokenizers are refused by name before the run directory contains anything."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from sparring.loop import play

from .conftest import Refusal


def edit_json(folder: Path, name: str, **changes: object) -> None:
    content = json.loads((folder / name).read_text())
    for key, value in changes.items():
        if value is None:
            content.pop(key, None)
        else:
            content[key] = value
    (folder / name).write_text(json.dumps(content))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder, "config.json", **changes)


def poison(value: float) -> Callable[[Path], None]:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value

    return lambda folder: edit_weights(folder, change)


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, share: float = 0.5) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return change


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def shard(folder: Path, *, lose: str | None = None) -> None:
    """Splits the weights into two files with an index; `lose` deletes one of them."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({n: weights[n] for n in inside}, folder / file, metadata={"format": "pt"})
    where = {n: file for file, inside in parts.items() for n in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()
    if lose:
        (folder / lose).unlink()


def only_pickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def template(text: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        if text is not None:
            (folder / "chat_template.jinja").write_text(text)

    return change


def without_end_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for name in ("generation_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)


def runaway(folder: Path) -> None:
    """A regular expression that backtracks through every way to split a text."""
    split = {
        "type": "Split",
        "pattern": {"Regex": r"(.|..|...|..?.?)+$(?<=z)"},
        "behavior": "Isolated",
        "invert": False,
    }
    edit_json(folder, "tokenizer.json", pre_tokenizer=split)


FORGETFUL = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ '<|assistant|><|user|>' }}{% endif %}"
)

MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (remove("config.json"), r"has no config\.json, so it is not a transformers model folder"),
    "config cut": (cut("config.json"), r"config\.json cannot be read"),
    "config empty": (write("config.json", b""), r"config\.json cannot be read"),
    "config a list": (write("config.json", b"[1]"), r"config\.json cannot be read"),
    "config of bytes": (write("config.json", bytes(range(256))), r"config\.json cannot be read"),
    "no model type": (config(model_type=None, architectures=None), r"config\.json cannot be loaded"),
    "an unknown model type": (config(model_type="no-such"), r"config\.json cannot be loaded"),
    "a model that does not generate": (config(model_type="vit"), "cannot be loaded|lack"),
    "heads that do not divide": (config(num_attention_heads=5, num_key_value_heads=3), "cannot be loaded"),
    "a width of words": (config(hidden_size="wide"), "cannot be loaded"),
    "another width": (config(hidden_size=64, head_dim=None), "cannot be loaded"),
    "a vocabulary of nothing": (config(vocab_size=0), "cannot be loaded"),
    "more layers than weights": (config(num_hidden_layers=3), r"lack model\.layers\.2\.\S+ and 8 more"),
    "a missing weight": (
        lambda f: edit_weights(f, lambda w: w.pop("model.layers.0.self_attn.q_proj.weight")),
        r"lack model\.layers\.0\.self_attn\.q_proj\.weight",
    ),
    "weights cut": (cut("model.safetensors"), "cannot be loaded"),
    "weights empty": (write("model.safetensors", b""), "cannot be loaded"),
    "weights of zeros": (write("model.safetensors", bytes(1000)), "cannot be loaded"),
    "a header that promises too much": (write("model.safetensors", b"\xff" * 8 + b"{}"), "cannot be loaded"),
    "not a number": (poison(float("nan")), r"model\.layers\.1\.mlp\.down_proj\.weight .*not finite"),
    "infinite": (poison(float("-inf")), "not finite"),
    "a missing shard": (lambda f: shard(f, lose="model-00002-of-00002.safetensors"), "cannot be loaded.*model-00002"),
    "an empty index": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").write_text("{}"), None)[-1],
        "cannot be loaded",
    ),
    "only pickles": (only_pickles, r"pytorch_model\.bin can run code when it is read: convert it to safetensors"),
    "no weights": (remove("model.safetensors"), r"has no \*\.safetensors"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "the tokenizer in .* cannot be loaded"),
    "tokenizer cut": (cut("tokenizer.json"), "the tokenizer in .* cannot be loaded"),
    "tokenizer of bytes": (write("tokenizer.json", bytes(range(256))), "the tokenizer in .* cannot be loaded"),
    "tokenizer config cut": (cut("tokenizer_config.json"), r"tokenizer_config\.json cannot be read"),
    "a tokenizer that backtracks": (runaway, r"the tokenizer in .* failed .*tokenizer\.json"),
    "more tokens than embeddings": (
        lambda f: (config(vocab_size=8)(f), edit_weights(f, lambda w: w.update(
            {"model.embed_tokens.weight": w["model.embed_tokens.weight"][:8].clone()})))[-1],
        r"token \d+, .*embeddings for tokens 0 to 7",
    ),
    "no chat template": (template(None), "data.template: the tokenizer has no chat template. Set a text"),
    "a template with a fault": (template("{% for %}"), "data.template"),
    "a template that raises": (template("{{ raise_exception('no') }}"), "data.template.*no"),
    "a template that divides by zero": (template("{{ 1 // 0 }}"), "data.template.*zero"),
    "a template with an endless loop": (template("{% for i in range(10**12) %}{% endfor %}"), "data.template"),
    "a template that reads internals": (template("{{ ''.__class__.__mro__ }}"), "data.template.*unsafe"),
    "an empty template": (template("{{ '' }}"), "the prompt has no tokens"),
    "a template without responses": (template("{{ messages[0]['content'] }}"), "row 1 .*leaves out a part of the resp"),
    "a template that forgets its prefix": (template(FORGETFUL), "row 1 .*not a prefix of the conversation"),
    "no end token anywhere": (without_end_tokens, "data.end_token: neither the template nor the tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_broken_model_is_named(name: str, task: Path, refusal: Refusal) -> None:
    change, message = MODELS[name]
    change(task / "model")
    output = refusal()
    assert re.search(message, output, re.DOTALL), output
    assert str(task) in output or "data." in output


def test_a_model_that_is_a_file(task: Path, refusal: Refusal) -> None:
    assert "has no config.json" in refusal(f"model={task / 'rows.jsonl'}")


WORKS: dict[str, Callable[[Path], None]] = {
    "shards": shard,
    "half precision beside single": lambda f: edit_weights(
        f, lambda w: w.update({n: t.half() for n, t in list(w.items())[::2]})
    ),
    "no pad token": lambda f: edit_json(f, "tokenizer_config.json", pad_token=None),
    "pad is end": lambda f: edit_json(f, "tokenizer_config.json", pad_token="<|end|>"),
}


@pytest.mark.parametrize("name", WORKS)
def test_unusual_but_valid_models_are_played(name: str, task: Path) -> None:
    """Control: damage is refused, and unusual models are not."""
    WORKS[name](task / "model")
    assert play(task / "recipe.yaml", task / "run", ["data.held_out=0"]).run.report.is_file()
    shutil.rmtree(task / "run")
