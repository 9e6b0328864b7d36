"""Shared fixtures: a task folder that tests break, and a check of how the command line refuses it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparring.cli import main

RECIPE = """\
model: {model}
method: spin
iterations: 1
data: {{train: {train}, held_out: 4, max_skipped: 0}}
generate: {{max_new_tokens: 4}}
train: {{epochs: 1, dtype: float32, max_length: 64}}
threads: 1
"""

Refusal = Callable[..., str]


def rows(count: int = 20) -> list[dict[str, object]]:
    return [{"question": f"{i + 2} eggs, 1 lost", "answer": f"{i + 1} #### {i + 1}"} for i in range(count)]


def lines(*changed: object, at: int = 7) -> bytes:
    """JSON lines with valid rows, except that line `at` is replaced by `changed`: raw bytes or values."""
    good = [json.dumps(row).encode() for row in rows()]
    good[at - 1 : at] = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in changed]
    return b"\n".join(good) + b"\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    mask = os.umask(0o077)
    yield
    os.umask(mask)


@pytest.fixture
def task(tiny: Path, tmp_path: Path) -> Path:
    """A folder with a valid model/, rows.jsonl and recipe.yaml."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "rows.jsonl").write_bytes(lines(rows()[6]))
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tmp_path / "model", train=tmp_path / "rows.jsonl"))
    return tmp_path


@pytest.fixture
def refusal(task: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Refusal:
    """Runs the command line in this process. It must refuse with one message and leave no partial run directory."""

    def refuse(*overrides: str) -> str:
        monkeypatch.setattr(
            "sys.argv", ["sparring", "run", str(task / "recipe.yaml"), str(task / "run"), *map(str, overrides)]
        )
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        output = capfd.readouterr().err
        assert ended.value.code == 2, output
        assert "Traceback" not in output
        message = output[output.index("error: ") :]
        assert output.count("error: ") - message[7:].count("error: ") == 1
        assert len(message) < 3000, "short enough to read"
        left = [p.name for p in (task / "run").rglob("*")] if (task / "run").exists() else []
        assert set(left) <= {".lock"}, left
        return message

    return refuse
