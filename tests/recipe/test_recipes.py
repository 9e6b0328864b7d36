"""Every shipped recipe: the 7B ones are read and hold the published settings, the tiny ones are played."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparring.loop import play
from sparring.objectives import Space, Spin, Tspin
from sparring.recipe.load import load_recipe
from sparring.run.results import Results

RECIPES = Path(__file__).parents[2] / "recipes"
TINY = sorted(RECIPES.glob("tiny-*.yaml"))


def test_spin_zephyr_7b() -> None:
    recipe = load_recipe(RECIPES / "spin-zephyr-7b.yaml")
    assert [recipe.at(t).method for t in range(4)] == [Spin(), Spin(), Spin(), Spin(lambda_=5.0)]
    assert [recipe.at(t).train.learning_rate for t in range(4)] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert (recipe.train.optimizer, recipe.train.batch_size, recipe.train.epochs) == ("rmsprop", 64, 2)


def test_tspin_zephyr_7b() -> None:
    recipe = load_recipe(RECIPES / "tspin-zephyr-7b.yaml")
    assert [recipe.at(t).method for t in range(5)] == [Tspin(alpha=1.0, beta=0.1 if t else 0.0) for t in range(5)]
    assert recipe.iterations == 5


def test_space_mistral_7b() -> None:
    recipe = load_recipe(RECIPES / "space-mistral-7b.yaml")
    assert recipe.method == Space(mu=1.0) and recipe.generate.samples == 1 and recipe.iterations == 5


def test_the_7b_recipes_share_data_template_and_batch() -> None:
    recipes = [load_recipe(path) for path in sorted(RECIPES.glob("*-7b.yaml"))]
    assert len(recipes) == 4
    for recipe in recipes:
        assert recipe.data == recipes[0].data
        assert recipe.data.template == "### Instruction: {prompt}\n\n### Response: "
        assert (recipe.generate.temperature, recipe.generate.top_p, recipe.generate.max_new_tokens) == (1.0, 1.0, 256)


def test_there_is_a_tiny_recipe_for_each_method() -> None:
    assert [path.stem for path in TINY] == ["tiny-sft", "tiny-space", "tiny-spin-lora", "tiny-spin", "tiny-tspin"]


@pytest.mark.slow
@pytest.mark.parametrize("path", TINY, ids=lambda p: p.stem)
def test_tiny_recipes_are_played(path: Path, tiny: Path, tmp_path: Path) -> None:
    """On the random tiny model, with rows turned into texts; tests/test_real_input.py plays them on real ones."""
    rows = [json.loads(line) for line in (tiny / "rows.jsonl").read_text().splitlines()]
    texts = tmp_path / "stories.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{r['question']}. {r['answer']}"}) + "\n" for r in rows))
    overrides = [f"model={tiny / 'model'}", f"data.train={texts}", "data.end_token=null", "generate.max_new_tokens=8"]
    run = play(path, tmp_path / "run", [*overrides, "data.held_out=8"]).run
    assert len(Results(run.root).evaluations()) == 3
