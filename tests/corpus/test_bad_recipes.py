"""Bad recipes: one message with file, line and problem, and exit code 2."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .conftest import Refusal

# name -> (what is added to a good recipe, or a whole text, what the message says)
ADDED = {
    "a key twice": ("model: x\n", 'line 8: found duplicate key "model"'),
    "an unknown key": ("modle: x\n", "line 8: there is no setting 'modle'; did you mean 'model'"),
    "a nested unknown key": ("evaluate: {cheker: number}\n", "line 8: there is no setting 'evaluate.cheker'"),
    "a tag that runs code": ("seed: !!python/object/apply:os.system [exit]\n", "line 8: .*tags"),
    "a tag that makes a tuple": ("seed: !!python/tuple [1]\n", "line 8: .*tags"),
    "an alias": ("evaluate: &a {checker: number}\nper_iteration: *a\n", r"line 9: aliases .* are not allowed"),
    "a merge key": ("evaluate: {<<: {checker: number}}\n", "line 8: .*merge keys"),
    "a tab": ("evaluate:\n\tchecker: number\n", "line 9: found character"),
    "an open bracket": ("evaluate: [1, 2\n", "line 9"),
    "an open quote": ("evaluate: 'x\n", "line"),
    "a second document": ("---\nmodel: x\n", "line 8: but found another document"),
    "a nul byte": ("seed: \0\n", "special characters are not allowed|unacceptable character"),
    "an escape character": ("seed: \x1b[31m\n", "special characters are not allowed|unacceptable character"),
    "a null key": ("~: 1\n", "line 8: a key must be a word"),
    "a list as key": ("? [a, b]\n: 1\n", "line 8: a key must be a word"),
    "a float as key": ("1.5: 1\n", "line 8: a key must be a word"),
    "a section that is a list": ("evaluate: [checker]\n", "line 8: evaluate: input should be"),
    "a section that is a number": ("evaluate: 3\n", "line 8: evaluate: input should be"),
    "a negative seed": ("seed: -1\n", "line 8: seed: input should be greater than or equal to 0, not -1"),
    "a seed of words": ("seed: lots\n", "line 8: seed: input should be a valid integer"),
    "a seed of 5,000 digits": (f"seed: {'9' * 5000}\n", "seed|line 8"),
    "an invalid octal": ("seed: 0o99\n", "line 8: seed"),
    "no threads": ("threads: 0\n", 'found duplicate key "threads"'),
    "an unknown checker": ("evaluate: {checker: nmber}\n", "evaluate.checker"),
    "a broken pattern": ("evaluate: {checker: {regex: '('}}\n", "not a regular expression"),
    "a metric without its checker": ("evaluate: {save_best_by: greedy_accuracy}\n", "needs evaluate.checker"),
    "per_iteration of data": ("per_iteration: {0: {data.limit: 3}}\n", "'data.limit' cannot change between iterations"),
    "per_iteration of nothing": ("per_iteration: {0: {train: 3}}\n", "per_iteration.0"),
    "per_iteration without a number": ("per_iteration: {first: {}}\n", "per_iteration"),
    "another game's coefficient": ("per_iteration: {0: {method.mu: 1.0}}\n", "per_iteration.0"),
}  # fmt: skip

WHOLE = {
    "empty": (b"", "a recipe is a mapping"),
    "a list": (b"- a\n- b\n", "a recipe is a mapping such as 'model: path', not a list"),
    "a word": (b"hello\n", "not a str"),
    "only comments": (b"# hello\n", "a recipe is a mapping"),
    "json cut": (b'{"model": "m"', "line"),
    "utf-16": ("model: m\n".encode("utf-16"), "cannot be read"),
    "latin-1": ("model: é\n".encode("latin-1"), "cannot be read"),
    "bytes": (bytes(range(256)), "cannot be read"),
    "too large": (b"#" * 1_000_001, "larger than 1000000 bytes"),
    "nested too deeply": (b"[" * 5000, "line 1: nested too deeply"),
    "mappings nested too deeply": (b"a: " + b"{a: " * 3000, "line 1: nested too deeply"),
    "no model": (b"method: spin\ndata: {train: x.jsonl}\n", "'model' is missing"),
    "no data": (b"model: m\nmethod: spin\n", "'data' is missing"),
    "no method": (b"model: m\ndata: {train: x.jsonl}\n", "'method' is missing|method.name must be one of"),
    "an unknown method": (b"model: m\nmethod: ppo\ndata: {train: x}\n", "method.name must be one of sft, dft, rft"),
    "a method that is a list": (b"model: m\nmethod: [spin]\ndata: {train: x}\n", "method"),
    "a method that is a number": (b"model: m\nmethod: 3\ndata: {train: x}\n", "method"),
    "a method of null": (b"model: m\nmethod:\ndata: {train: x}\n", "method"),
}  # fmt: skip

OVERRIDES = {
    "no value": ("train.epochs", "Write key=value"),
    "no key": ("=3", "Write key=value"),
    "an unknown key": ("train.epoch=3", "did you mean 'train.epochs'"),
    "a value that is no YAML": ("train.epochs=[", "override 'train.epochs=\\['"),
    "below a value": ("model.name=x", "model is not a mapping"),
    "not a number": ("train.learning_rate=.nan", "train.learning_rate"),
    "an infinite rate": ("train.learning_rate=1e400", "train.learning_rate"),
    "a negative rate": ("train.learning_rate=-1", "train.learning_rate: input should be greater than 0"),
    "no batch": ("train.batch_size=0", "train.batch_size: input should be greater than 0"),
    "half an epoch": ("train.epochs=0.5", "train.epochs"),
    "an unknown backend": ("generate.backend=sglang", "generate.backend"),
    "a top_p above 1": ("generate.top_p=1.5", "generate.top_p"),
    "a share above 1": ("data.max_skipped=2", "data.max_skipped"),
    "an escape in a key": ("tr\x1b[31m=1", "there is no setting"),
}


@pytest.mark.parametrize("name", ADDED)
def test_a_line_is_named(name: str, task: Path, refusal: Refusal) -> None:
    text, message = ADDED[name]
    with (task / "recipe.yaml").open("a") as file:
        file.write(text)
    output = refusal()
    assert re.search(message, output) and str(task / "recipe.yaml") in output, output


@pytest.mark.parametrize("name", WHOLE)
def test_a_broken_recipe_is_named(name: str, task: Path, refusal: Refusal) -> None:
    content, message = WHOLE[name]
    (task / "recipe.yaml").write_bytes(content)
    output = refusal()
    assert re.search(message, output) and str(task / "recipe.yaml") in output, output


@pytest.mark.parametrize("name", OVERRIDES)
def test_an_override_is_named(name: str, refusal: Refusal) -> None:
    override, message = OVERRIDES[name]
    output = refusal(override)
    assert re.search(message, output), output
    assert "\x1b" not in output


def test_a_recipe_that_is_a_folder_or_not_there(task: Path, refusal: Refusal) -> None:
    (task / "recipe.yaml").unlink()
    assert "there is no file" in refusal()
    (task / "recipe.yaml").mkdir()
    assert "recipe.yaml cannot be read" in refusal()
