"""`dtype: auto` is resolved once, where a run starts. On another machine the same command continues it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sparring.commands.compare import check_comparison_settings, comparison_settings
from sparring.errors import RunMismatch
from sparring.recipe.schema import Recipe
from sparring.run.mirror import Mirror
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings, fetch_from_mirror, load_sealed_recipe

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize("there", [{"dtype": "auto"}, {}])
def test_another_machine_keeps_the_dtype_of_a_run(
    there: dict[str, str], make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recipe(is_fast: bool, **train: str) -> Recipe:
        monkeypatch.setattr("sparring.recipe.schema.has_bfloat16_products", lambda: is_fast)
        raw = make_recipe("spin").model_dump(by_alias=True)
        kept = {key: value for key, value in raw["train"].items() if key != "dtype"}
        return Recipe.model_validate({**raw, "train": {**kept, **train}})

    run, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "comparison")
    for folder in (run.root, whole.root):
        folder.mkdir()
    assert check_settings(run, recipe(is_fast=True, **there)).train.dtype == "bfloat16"
    run.data.mkdir()
    check_comparison_settings(whole, recipe(is_fast=True, **there))

    moved = recipe(is_fast=False, **there)
    assert moved.train.dtype == "float32"
    assert check_settings(run, moved).train.dtype == "bfloat16"
    assert load_sealed_recipe(run.recipe).train.dtype == "bfloat16"
    check_comparison_settings(whole, comparison_settings(whole, moved))
    assert load_sealed_recipe(whole.root / "comparison.yaml").train.dtype == "bfloat16"
    mirror = Mirror(str(tmp_path / "mirror"))
    mirror.send_note(run, run.recipe)
    fetch_from_mirror(RunDir(tmp_path / "new"), moved, mirror)  # holds a run with the same settings

    with pytest.raises(RunMismatch, match="train.dtype is 'float32', but the run was started with 'bfloat16'"):
        check_settings(run, recipe(is_fast=True, dtype="float32"))  # what is asked for is compared
