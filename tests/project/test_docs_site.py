"""The documentation as a site: it builds, every page is in it, and it asks nobody for anything."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    built = subprocess.run(
        [sys.executable, ROOT / "scripts" / "build_docs", out], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return out


def pages_in_the_menu() -> list[str]:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    return [page for group in nav for pages in group.values() for entry in pages for page in entry.values()]


def test_every_page_is_in_the_menu_once_and_in_the_site(site: Path) -> None:
    there = sorted(str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md"))
    assert sorted(pages_in_the_menu()) == there
    for page in there:
        name = page.removesuffix(".md") if not page.endswith("README.md") else page.replace("README.md", "index")
        assert (site / f"{name}.html").is_file(), page


def test_it_asks_nobody_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        asked = re.findall(r"<(?:script|img|iframe|source)[^>]* src=[\"\']?(https?:[^\"\' >]+)", text)
        asked += re.findall(
            r"<link[^>]* rel=[\"\']?(?:stylesheet|preconnect|icon)[^>]* href=[\"\']?(https?:[^\"\' >]+)", text
        )
        assert not asked, (page.name, asked)


def test_links_out_of_the_documentation_become_words(site: Path) -> None:
    text = (site / "performance.html").read_text()
    assert "benchmarks/step.py" in text and "../benchmarks" not in text


@pytest.mark.parametrize("wrong", ["[nowhere](nowhere.md)", "[no such part](report.md#nowhere)"])
def test_a_broken_link_ends_the_build(tmp_path: Path, wrong: str) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write(f"\n{wrong}\n")
    build = runpy.run_path(str(ROOT / "scripts" / "build_docs"))["build"]
    assert build(tmp_path / "docs", tmp_path / "site") != 0 and not (tmp_path / "site").exists()


def test_the_messages_of_the_troubleshooting_page_are_those_that_are_said() -> None:
    """Every message that the page explains stands in the source, however its lines are broken."""
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    said = re.sub(r'"\s*\n\s*f?"', "", source)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    explained = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(explained) >= 30
    missing = [
        words for words in explained if words not in said and words not in said.replace("{{", "{").replace("}}", "}")
    ]
    assert not missing
