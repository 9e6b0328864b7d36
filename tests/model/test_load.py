"""Model folders: what is read, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparring.errors import UserError
from sparring.model.load import declared_end_ids, load_model, load_tokenizer, resolve_model, save_successor

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny / "model", tmp_path / "model")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_in_their_own_dtype_are_mapped_from_their_file(folder: Path) -> None:
    """So that the ranks of a machine, which shard them, hold one copy among them."""

    def share_mapped(dtype: torch.dtype | Literal["auto"]) -> float:
        model = load_model(folder, dtype=dtype, device=CPU)
        lines = [line.split() for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()]
        ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines if line[-1].endswith(".safetensors")]
        places = [parameter.data_ptr() for parameter in model.parameters()]
        return sum(any(start <= place < end for start, end in ranges) for place in places) / len(places)

    assert share_mapped("auto") == 1
    assert share_mapped(torch.bfloat16) == 0, "a control"


def test_a_successor_is_used_like_its_origin(folder: Path, tmp_path: Path) -> None:
    """Its tokenizer and generation files are the origin's, even where transformers would refuse to write them."""
    generation = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [3, 2]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    model = load_model(folder, dtype=torch.float32, device=CPU)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    save_successor(model, folder, tmp_path / "next")
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "next" / name).read_bytes() == (folder / name).read_bytes()
    assert declared_end_ids(tmp_path / "next", load_tokenizer(tmp_path / "next")) == {2, 3}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "next")
    for expected, found in zip(model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(expected, found)
    assert AutoTokenizer.from_pretrained(tmp_path / "next").chat_template


def test_tied_weights_stay_tied_and_are_stored_once(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder, dtype=torch.float32, device=CPU)
    save_successor(model, folder, tmp_path / "next")
    again = load_model(tmp_path / "next", dtype=torch.float32, device=CPU)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    size = (tmp_path / "next" / "model.safetensors").stat().st_size
    assert size < 4.2 * sum(p.numel() for p in model.parameters()) + 10_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/nowhere/at/all", "there is no folder /nowhere/at/all. Relative paths start at the working directory"),
        ("nowhere", "there is no folder .*/nowhere"),
        ("some-org/some-model-that-is-not-there", "the hub did not return 'some-org/some-model-that-is-not-there'"),
    ],
)
def test_what_is_not_there_is_refused(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message):
        resolve_model(name)


def test_broken_folders_are_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer in .* cannot be loaded"):
        load_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder, dtype=torch.float32, device=CPU)
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(folder, dtype=torch.float32, device=CPU)


def test_code_in_a_model_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_model(folder, dtype=torch.float32, device=CPU)
    assert not marker.exists()
