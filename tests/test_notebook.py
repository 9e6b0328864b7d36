"""docs/python.ipynb in a real Jupyter kernel: one live line per progress bar, plain text otherwise, no warnings."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "write_notebook"))


def test_the_notebook_is_the_page(script: dict[str, Any]) -> None:
    saved = nbformat.read(ROOT / "docs" / "python.ipynb", as_version=4)
    assert [(cell.cell_type, cell.source) for cell in saved.cells] == [
        (cell.cell_type, cell.source) for cell in script["cells"]()
    ], "run scripts/write_notebook"
    code = [cell for cell in saved.cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in code) and "image/png" in str(code[2].outputs)
    assert "/tmp" not in str(saved)


@pytest.mark.slow
def test_the_notebook_runs(script: dict[str, Any], tmp_path: Path) -> None:
    notebook = script["execute"](tmp_path)
    code = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    every = [output for outputs in code for output in outputs]
    assert [output for output in every if output.output_type == "stream" and output.name == "stderr"] == []
    lines = [output.data["text/plain"] for output in every if output.output_type == "display_data"]
    assert all(line.strip() for line in lines), "an empty output block"
    assert any(line.startswith("  train 0: 6 of 6, ") for line in lines)
    printed = "".join(output.text for output in every if output.output_type == "stream")
    assert "iteration 0: train " in printed
    assert "{" not in printed, "JSON lines are for programs"
    report = tmp_path / "runs" / "space" / "report.html"
    assert code[0][-1].data["text/plain"] == f"space: 2 of 2 iterations trained; report: {report}"
    logged = "".join(output.text for output in code[3] if output.output_type == "stream")
    assert "2 train " in logged and "1 train " not in logged, "a callback does not repeat what was done"
    assert "sft" in code[4][-1].data["text/plain"] and "space" in code[4][-1].data["text/plain"]
    assert (tmp_path / "out" / "config.json").is_file()
