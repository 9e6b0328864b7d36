"""`sparring init`, `doctor` and `preview`: a recipe is written, checked and inspected before a run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import sparring.commands.doctor
import sparring.commands.preview
from sparring.commands.doctor import MAX_ROWS, examine
from sparring.commands.forecast import empty_model, forecast, trained_tensors
from sparring.commands.init import write_recipe
from sparring.commands.preview import color_tokens, decode_tokens
from sparring.errors import UserError
from sparring.loop import play
from sparring.model.load import load_model
from sparring.recipe.load import dump_recipe, json_schema, load_recipe
from sparring.recipe.schema import Adapter, Recipe
from sparring.run.iteration import DataSummary

MakeRecipe = Callable[..., Recipe]
RECIPES = Path(__file__).parents[2] / "recipes"


def texts(recipe: Recipe, level: str) -> str:
    return "\n".join(finding.text for finding in examine(recipe) if finding.level == level)


def test_doctor_reports_what_a_run_would_find(make_recipe: MakeRecipe, tiny: Path, tmp_path: Path) -> None:
    """Within seconds and without writing. Rows, tokens and end tokens agree with what the data stage records."""
    rows = (tiny / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, "{", '{"question": "?"}', rows[0]]) + "\n")
    recipe = make_recipe("spin", data={"train": str(tmp_path / "rows.jsonl")}, generate={"max_new_tokens": 6})
    start = time.monotonic()
    found = list(examine(recipe))
    assert time.monotonic() - start < 10
    assert not [f for f in found if f.level == "bad"]
    good, notes = texts(recipe, "good"), texts(recipe, "note")
    assert "60 usable rows in the format question/answer" in good
    assert "3 rows cannot be used" in notes and "row 61" in notes and "of the real responses are truncated" in notes
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.jsonl"]
    run = play(make_recipe("spin", data={"train": str(tmp_path / "rows.jsonl")}, iterations=1), tmp_path / "run").run
    summary = DataSummary.read(run.data / "summary.json")
    assert f"End token: '{summary.end_token}'" in good
    assert summary.num_train + summary.num_held_out == 60 and sum(summary.skipped.values()) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere"}, "there is no folder /nowhere"),
        ({"data": {"train": "/nowhere.jsonl"}}, "/nowhere.jsonl does not exist"),
        ({"data": {"template": "no place"}}, "has no {prompt}"),
        ({"data": {"end_token": "<|nothing|>"}}, "the tokenizer has no token '<|nothing|>'"),
        ({"data": {"held_out": "/nowhere.jsonl"}}, "/nowhere.jsonl does not exist"),
    ],
)
def test_doctor_finds_problems(make_recipe: MakeRecipe, changes: dict[str, object], message: str) -> None:
    assert message in texts(make_recipe("tspin", **changes), "bad")


def test_doctor_reads_a_sample_of_many_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = [{"question": f"{i} eggs", "answer": "2"} for i in range(MAX_ROWS + 10)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe("tspin", data={"train": str(tmp_path / "many.jsonl")})
    assert f"{MAX_ROWS:,} usable rows" in texts(recipe, "good") and "(there are more)" in texts(recipe, "good")


def test_the_forecast_equals_what_a_run_writes(make_recipe: MakeRecipe, tiny: Path, tmp_path: Path) -> None:
    """Parameters, steps and bytes of weights, exactly."""
    for name, adapter in (("whole", None), ("adapter", {"r": 4, "use_dora": True})):
        recipe = make_recipe("spin", adapter=adapter, train={"epochs": 1})
        expected = forecast(recipe, tiny / "model", 48)
        run = play(recipe, tmp_path / name).run
        model = load_model(run.model(1), dtype=torch.float32, device=torch.device("cpu"))
        counts = {n: p.numel() for n, p in model.named_parameters()}
        adapted = sum(count for n, count in counts.items() if "lora_" in n)
        assert expected.num_parameters == sum(counts.values()) - adapted
        assert expected.num_trained == (adapted or sum(counts.values()))
        lines = (run.stage(1, "train") / "metrics.jsonl").read_text().splitlines()
        assert expected.steps_per_iteration == len(lines)
        files = run.root.rglob("*.safetensors")
        weights = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
        checkpoints = 3 * expected.num_trained * 4 * 2  # a finished run has deleted them
        assert weights == expected.disk_bytes - checkpoints


@pytest.mark.parametrize("target", ["all-linear", r".*\.[qv]_proj", ("up_proj", "down_proj")])
def test_the_size_of_an_adapter_is_peft_s(tiny: Path, target: str | tuple[str, ...]) -> None:
    from sparring.model.lora import train_adapter

    settings = Adapter(r=4, target_modules=target)
    model = load_model(tiny / "model", dtype=torch.float32, device=torch.device("cpu"))
    train_adapter(model, settings.for_peft(), 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained_tensors(empty_model(tiny / "model"), settings).total == trained


def test_preview_shows_tokens_and_a_scored_response(
    make_recipe: MakeRecipe, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()[:4]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = StringIO()
    console = Console(file=output, force_terminal=True, width=200, color_system="truecolor")
    monkeypatch.setattr(sparring.commands.preview, "Console", lambda: console)
    sparring.commands.preview.preview(make_recipe("spin", data={"train": str(tmp_path / "rows.jsonl")}), 2)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output.getvalue())
    assert rows[0]["question"] in plain and rows[1]["answer"] in plain and rows[2]["question"] not in plain
    assert plain.count("<|end|>") >= 3, "end tokens are shown"
    assert re.search(r"Generated response to row 1: \d+ tokens, log p -\d+", plain)
    assert re.search(r"Real response to row 1: \d+ tokens, log p -\d+", plain)
    assert "\x1b[1;37;41m<|end|>" in output.getvalue(), "an end token has its own color"


def test_control_characters_are_visible() -> None:
    from sparring.logging import escape_control

    assert escape_control("a\x1b]0;title\x07b\u202e") == "a\\u001b]0;title\\u0007b\\u202e"


@pytest.mark.parametrize("method", ["spin", "tspin", "space", "sft"])
@pytest.mark.parametrize("lora", [False, True])
def test_init_writes_a_recipe_that_doctor_passes(
    tiny: Path, tmp_path: Path, method: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparring.commands.doctor, "training_bytes", lambda *_: 1)  # tests/stages/test_dry_run.py
    path = tmp_path / "recipe.yaml"
    write_recipe(path, model=str(tiny / "model"), data=str(tiny / "rows.jsonl"), method=method, lora=lora)
    recipe = load_recipe(path)
    assert recipe.method.name == method and (recipe.adapter is not None) == lora
    assert recipe.evaluate.checker == "number", "init reads the responses"
    assert path.read_text().count("#") > 10
    assert not texts(recipe, "bad")


def test_init_reads_rows_and_tokenizer(tiny: Path, tmp_path: Path) -> None:
    texts_file = tmp_path / "texts.jsonl"
    texts_file.write_text('{"text": "One sentence. Another one."}\n')
    write_recipe(tmp_path / "a.yaml", model=str(tiny / "model"), data=str(texts_file), method="spin", lora=False)
    assert load_recipe(tmp_path / "a.yaml").data.split_on == "sentence"
    with pytest.raises(UserError, match="exists already"):
        write_recipe(tmp_path / "a.yaml", model=str(tiny / "model"), data=str(texts_file), method="spin", lora=False)
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"frage": "x", "antwort": "y"}\n')
    cases = {
        "Map them with data.columns": {"data": str(odd)},
        "Use one of sft, dft, rft, sdft, spin, tspin, space": {"method": "ppo"},
        "there is no folder /nowhere": {"model": "/nowhere"},
    }
    for message, changes in cases.items():
        options = {"model": str(tiny / "model"), "data": str(texts_file), "method": "spin", **changes}
        with pytest.raises(UserError, match=message):
            write_recipe(tmp_path / "b.yaml", **options, lora=False)
    assert not (tmp_path / "b.yaml").exists()


def test_the_schema_accepts_recipes_and_nothing_else(make_recipe: MakeRecipe) -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    good = [yaml.safe_load(path.read_text()) for path in sorted(RECIPES.glob("*.yaml"))]
    good += [yaml.safe_load(dump_recipe(make_recipe(m))) for m in ("sft", "spin", "tspin", "space")]
    for raw in good:
        raw = json.loads(json.dumps(raw))  # editors see the keys of per_iteration as strings
        for section, key in (("train", "learning_rate"),):
            if isinstance(raw.get(section, {}).get(key), str):  # 5e-7, which PyYAML reads as a string
                raw[section][key] = float(raw[section][key])
        assert not [error.message for error in validator.iter_errors(raw)]
    assert json.loads(json.dumps(schema))["properties"]["train"]
    for wrong in ({"train": {"epoch": 1}}, {"method": "ppo"}, {"trian": {}}, {"method": {"name": "spin", "beta": 1}}):
        assert list(validator.iter_errors({"model": "m", "method": "spin", "data": {"train": "x"}, **wrong})), wrong
    assert "eal responses" in json.dumps(schema), "editors show what a key means"


def test_memory_is_per_device(make_recipe: MakeRecipe, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparring.commands.doctor, "device_memory", lambda ranks: 1)
    texts_by_setting = {}
    for parallel in ("ddp", "fsdp2"):
        recipe = make_recipe("spin", launch="torchrun", num_processes=4, parallel=parallel)
        found = sparring.commands.doctor.examine_memory(recipe, tiny / "model", 1000)
        assert found.level == "bad" and "on each of 4 devices" in found.text
        assert "Lower train.micro_batch_tokens" in found.text
        texts_by_setting[parallel] = found.text
    sharding = "parallel: fsdp2 on several devices"
    assert sharding in texts_by_setting["ddp"] and sharding not in texts_by_setting["fsdp2"]


def test_a_preview_keeps_leading_spaces_of_tokens() -> None:
    """A tokenizer like Llama's and Mistral's, which decodes a lone "▁cat" without its space."""
    words = {"▁": 0, "▁A": 1, "▁cat": 2, "s": 3, "<0xC3>": 4, "<0xA9>": 5, "</s>": 6}
    made = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    assert tokenizer.decode([2]) == "cat"
    ids = np.array([1, 2, 3, 6], dtype=np.int32)
    assert color_tokens(tokenizer, ids[:2], ids[2:], has_end=True).plain == "A cats</s>"
    assert "".join(decode_tokens(tokenizer, [1, 2, 3])) == "A cats"
    assert len(list(decode_tokens(tokenizer, [1, 4, 5, 2]))) == 4, "a character of two tokens"
