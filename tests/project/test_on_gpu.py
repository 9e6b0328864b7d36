"""The script for GPUs: its parts with small sizes on a CPU, and that none of them costs the others."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def on_gpu() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
        return import_module("on_gpu")


def test_kernels_and_layouts_agree(on_gpu: ModuleType) -> None:
    assert max(v for v in on_gpu.run_part("kernels", True).values() if isinstance(v, float)) < 1e-4
    found = on_gpu.run_part("layouts", True)
    assert max(found["errors"]["pieces"] + found["errors"]["shared"]) < 1e-4
    assert found["flex_options"] == {"bfloat16": None, "float32": None}, "on a CPU"


def test_steps_and_heads_are_measured(on_gpu: ModuleType) -> None:
    found = on_gpu.run_part("training 3b", True)
    assert found["shared"]["seconds"] > 0 and found["padded"]["share_of_matrix_peak"] > 0
    head = on_gpu.run_part("head", True)
    assert head["ours, float32"]["largest_error_of_log_prob"] < 1e-4
    assert "failed" not in str(found) + str(head)


def test_a_run_is_played(on_gpu: ModuleType) -> None:
    found = on_gpu.play_run(True, "adapter={r: 2}")
    assert {"iter-01/generate", "iter-01/score", "iter-01/train"} <= set(found["stages"])
    assert found["forecast_mib"] > 0


@pytest.mark.parametrize(
    "program, failed",
    [
        ("print('a word'); print('{\"value\": 3}')", None),
        ("raise SystemExit('out of memory')", "status 1"),
        ("import time; time.sleep(60)", "more than 1 s"),
        ("print('no result')", "Expecting value"),
    ],
)
def test_a_part_that_fails_is_one_line(on_gpu: ModuleType, program: str, failed: str | None) -> None:
    line = on_gpu.supervise("a part", [sys.executable, "-c", program], 1 if failed and "more" in failed else 30)
    assert line["part"] == "a part" and line["seconds"] < 20
    if failed is None:
        assert line["value"] == 3 and "failed" not in line
    else:
        assert failed in line["failed"]
        assert "out of memory" in line["last_words"] or "status" not in failed


def test_it_refuses_a_machine_without_a_gpu(on_gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny"):
        on_gpu.run_part("kernels", False)
