"""What cannot fit into a device's memory is refused before anything is loaded, with what would make it fit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

import sparring.commands.forecast
from sparring.cli import main
from sparring.commands.forecast import check_memory, training_bytes
from sparring.errors import UserError
from sparring.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
LORA = {"adapter": {"r": 16}, "train": {"dtype": "bfloat16", "gradient_checkpointing": True, "max_length": 1024}}


def write_llama(folder: Path, layers: int) -> Path:
    """A config with the sizes of Llama 3.1 8B, and a file in place of its weights that would fail to load."""
    sizes = {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_key_value_heads": 8}
    LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=False).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return folder


@pytest.fixture
def llama_8b(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", 32)


@pytest.fixture
def gpu_of_24_gb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparring.commands.forecast, "local_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(sparring.commands.forecast, "device_memory", lambda ranks: 24e9)


@pytest.mark.usefixtures("gpu_of_24_gb")
def test_full_fine_tuning_of_3b_on_24_gb_is_refused_before_loading(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_llama(tmp_path / "model", 10)
    recipe = {"model": str(folder), "method": "spin", "data": {"train": str(tiny / "rows.jsonl")}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(sys, "argv", ["sparring", "run", str(tmp_path / "recipe.yaml"), str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    message = capsys.readouterr().err
    for words in ("on each device", "parallel: fsdp2", "train an adapter", "train.gradient_checkpointing: true"):
        assert words in message


@pytest.mark.usefixtures("gpu_of_24_gb")
def test_sharded_training_that_fits_still_needs_the_whole_model_for_scoring(
    llama_8b: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparring.commands.forecast, "peak_bytes", lambda *_: 10**9)
    sharded = {"launch": "torchrun", "parallel": "fsdp2", "num_processes": 8, "train": {"dtype": "bfloat16"}}
    with pytest.raises(UserError, match="scoring and evaluation hold the whole model on each device, 32.1 GB"):
        check_memory(make_recipe("spin", model=str(llama_8b), **sharded), tmp_path)
    check_memory(make_recipe("tspin", model=str(llama_8b), data={"held_out": 0}, **sharded), tmp_path)


@pytest.mark.usefixtures("gpu_of_24_gb")
def test_an_adapter_on_8b_fits_24_gb(llama_8b: Path, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    check_memory(make_recipe(model=str(llama_8b), **LORA), tmp_path)


def test_4_bits_and_buckets_are_counted(make_recipe: MakeRecipe, tiny: Path) -> None:
    def required(num_ranks: int = 1, **settings: object) -> int:
        return training_bytes(make_recipe("tspin", **settings), tiny / "model", "cuda", num_ranks)

    plain, quantized = (required(adapter={"r": 4, "load_in_4bit": bits}) for bits in (False, True))
    assert quantized < plain
    alone = required()
    assert required(2) > alone, "ranks that hold whole models keep gradients a second time, in buckets"
    assert required(2, parallel="fsdp2") < alone


@pytest.mark.usefixtures("gpu_of_24_gb")
def test_a_model_that_cannot_be_traced_is_not_refused(
    llama_8b: Path, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> int:
        raise RuntimeError("a size that depends on a number")

    recipe = make_recipe("spin", model=str(llama_8b), **LORA)
    monkeypatch.setattr(sparring.commands.forecast, "peak_bytes", fails)
    check_memory(recipe, tmp_path)
    monkeypatch.setattr(sparring.commands.forecast, "peak_bytes", lambda *_: 10**12)
    with pytest.raises(UserError, match="To make it fit, set launch: torchrun and parallel: fsdp2"):
        check_memory(recipe, tmp_path)
    check_memory(make_recipe("spin"), tmp_path)  # far too small to be traced
