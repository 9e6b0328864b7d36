"""A run in a real Jupyter kernel: one live line per progress bar, plain text otherwise, no warnings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe


@pytest.mark.slow
def test_a_run_in_a_notebook(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(make_recipe("space", iterations=1, threads=1)), encoding="utf-8")
    notebook = nbformat.v4.new_notebook()
    code = f"import sparring\nrun = sparring.play({str(recipe)!r}, {str(tmp_path / 'run')!r})\nrun"
    notebook.cells = [nbformat.v4.new_code_cell(code)]
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = notebook.cells[0].outputs
    assert [output for output in outputs if output.output_type == "stream" and output.name == "stderr"] == []
    lines = [output.data["text/plain"] for output in outputs if output.output_type == "display_data"]
    assert all(line.strip() for line in lines), "an empty output block"
    assert any(line.startswith("  train 0: 6 of 6, ") for line in lines)
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "iteration 0: train " in printed
    assert "{" not in printed, "JSON lines are for programs"
    assert outputs[-1].data["text/plain"] == f"space: 1 of 1 iterations trained; report: {tmp_path / 'run/report.html'}"
