"""README.md and docs/ describe what exists."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest

from sparring.objectives import Space
from sparring.recipe import yaml
from sparring.recipe.load import known_keys, make_recipe

ROOT = Path(__file__).parents[2]


def test_the_default_recipe_is_the_default() -> None:
    page = ROOT / "docs" / "recipe.md"
    text = re.findall(r"<!-- the default recipe -->\n```yaml\n(.*?)```", page.read_text(), re.DOTALL)[0]
    small = make_recipe({"model": "path-or-hub-id", "method": "tspin", "data": {"train": "rows.jsonl"}})
    assert make_recipe(yaml.parse(text, page.name)[0]) == small


def test_the_loss_example_runs() -> None:
    page = (ROOT / "docs" / "objectives" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(code, names)
    expected = math.log1p(math.exp(-2)) + math.log(2)  # real 2 nats above the opponent, generated level with it
    assert float(names["loss"]) == pytest.approx(expected)  # type: ignore[arg-type]


def test_every_key_is_documented() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text()
    for key in known_keys():
        if not key.startswith("method.") and key not in ("data", "generate", "train", "evaluate"):
            assert f"`{key}`" in page, key
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "objectives").glob("*.md"))
    for key in known_keys():
        if key.startswith("method.") and key != "method.name":
            assert f"`{key}`" in pages or f"`{key.removeprefix('method.')}" in pages, key


def test_links_and_the_map_of_the_tree_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), (page.name, target)
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 90
    tree = readme.partition("src/sparring/ ")[2].partition("tests/ ")[0]
    named = set(re.findall(r"(?<![\w/.])(\w+(?:\.py|/))", tree))
    package = ROOT / "src" / "sparring"
    there = {
        f"{p.name}/" if p.is_dir() else p.name
        for p in package.iterdir()
        if not p.name.startswith("__") and p.name != "py.typed"
    }
    assert named == there
    rooms = (ROOT / "docs" / "architecture.md").read_text()
    assert all(f"`{name}`" in rooms for name in there)


def test_modules_have_specific_names_and_at_most_400_lines() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        assert path.stem not in ("utils", "util", "common", "base", "helpers", "misc", "core")
        assert len(path.read_text().splitlines()) <= 400, path


def test_the_figures_script_plays_the_shipped_games() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "draw_exact_games"))
    assert script["distances"](lambda t: Space())[1] == pytest.approx(0, abs=1e-6)
    for name in script["GAMES"]:
        page = "README" if name == "games" else name
        assert (ROOT / "docs" / "objectives" / f"{name}.svg").read_text().startswith("<?xml")
        assert f"({name}.svg)" in (ROOT / "docs" / "objectives" / f"{page}.md").read_text()
