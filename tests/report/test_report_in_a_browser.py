"""The report in headless Chromium, opened from disk: no request, no console error, working filters and search."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparring.loop import play
from sparring.recipe.schema import Recipe

CHROMIUM = shutil.which("chromium")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")


@pytest.fixture(scope="module")
def report(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = {
        "model": str(tiny / "model"),
        "method": "spin",
        "iterations": 2,
        "data": {"train": str(tiny / "rows.jsonl"), "held_out": 12},
        "generate": {"max_new_tokens": 12},
        "train": {"learning_rate": 1e-2, "batch_size": 16, "dtype": "float32"},
        "evaluate": {"checker": "number"},
    }
    return play(Recipe.model_validate(raw), tmp_path_factory.mktemp("browser") / "run").run.report


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def open_page(browser: Any, report: Path, **options: object) -> tuple[Any, list[str]]:
    """A page, and everything that it asked for or complained about."""
    page, heard = browser.new_page(**options), []
    page.on("request", lambda request: heard.append(request.url) if not request.url.startswith("file:") else None)
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.goto(report.as_uri())
    return page, heard


def test_it_opens_without_a_request_or_an_error(browser: Any, report: Path) -> None:
    page, heard = open_page(browser, report)
    assert page.title() == "spin: run" and page.locator("figure svg").count() >= 9
    assert page.locator(".bar").count() >= 6
    assert heard == []
    page.close()


def test_filters_and_search(browser: Any, report: Path) -> None:
    page, heard = open_page(browser, report)
    shown = page.locator("#samples > details:visible")
    assert shown.count() == 12
    for kind in ("misaligned", "truncated", "wrong"):
        page.select_option("#kind", kind)
        expected = page.locator(f"#samples > details[data-{kind}=yes]").count()
        assert shown.count() == expected
        assert page.locator("#count").inner_text() == f"{expected} of 12 shown"
    page.select_option("#kind", "worst")
    margins = [float(d.get_attribute("data-margin")) for d in shown.all()]
    assert len(margins) == 12 and margins == sorted(margins)
    page.select_option("#kind", "all")
    words = page.locator("#samples > details pre").first.inner_text().split()[:3]
    page.fill("#search", " ".join(words).upper())
    assert 1 <= shown.count() < 12
    page.fill("#search", "words that no answer has")
    assert shown.count() == 0 and page.locator("#count").inner_text() == "0 of 12 shown"
    assert heard == []
    page.close()


def test_two_answers_side_by_side(browser: Any, report: Path) -> None:
    """Only the two are shown, their different words marked; and all of them again."""
    page, heard = open_page(browser, report)
    first = page.locator("#samples > details").first
    answers = first.locator(".response:visible")
    assert answers.count() == 4 and first.locator("mark").count() == 0
    before = answers.locator("pre").all_inner_texts()
    page.select_option("#left", "real")
    page.select_option("#right", "iteration 1")
    assert [a.get_attribute("data-source") for a in answers.all()] == ["real", "iteration 1"]
    shown = answers.locator("pre").all_inner_texts()
    assert shown == [before[0], before[3]], "marks change no text"
    marked = [set(answers.nth(n).locator("mark").all_inner_texts()) for n in (0, 1)]
    words = [set(text.split()) for text in shown]
    assert marked[0] >= words[0] - words[1] and marked[1] >= words[1] - words[0] and marked[0] != set()
    assert not words[0] & words[1] <= marked[0] or not words[0] & words[1]
    page.select_option("#left", "")
    assert answers.count() == 4 and first.locator("mark").count() == 0
    assert heard == []
    page.close()


CONTRASTS = """() => {
  const channel = (c) => (c /= 255, c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (top, below) => [0, 1, 2].map((i) => top[3] * top[i] + (1 - top[3]) * below[i]).concat([1]);
  const behind = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || element.closest("script, style, option, .skip")) continue;
    if (!element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const below = behind(element);
    const ink = over(parse(element.closest("svg") ? style.fill : style.color), below);
    const [dark, light] = [luminance(ink), luminance(below)].sort((a, b) => a - b);
    const size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
    const words = walker.currentNode.textContent.trim().slice(0, 40);
    found.push([(light + 0.05) / (dark + 0.05) / (isLarge ? 3 : 4.5), words]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_word_that_is_shown_has_the_contrast_of_wcag_aa(browser: Any, report: Path, scheme: str) -> None:
    """Everything opened; what the browser computed for each text, on what lies behind it."""
    page, _ = open_page(browser, report, color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
    page.select_option("#left", "real")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 300, "words of the page and of its figures"
    assert not [(words, share) for share, words in found if share < 1]
    page.add_style_tag(content=".soft { color: #888888 !important; }")
    assert [words for share, words in page.evaluate(CONTRASTS) if share < 1] or scheme == "dark", "it can fail"
    page.close()


def test_it_is_whole_without_script(browser: Any, report: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert page.locator("#samples > details:visible").count() == 12
    assert not page.locator("#filter").is_visible()
    context.close()


def test_the_keyboard_reaches_everything(browser: Any, report: Path) -> None:
    page, _ = open_page(browser, report)
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"kind", "search", "left", "right", "SUMMARY", "A"} <= reached
    second = page.locator("#samples > details").nth(1)
    second.locator("summary").focus()
    page.keyboard.press("Enter")
    assert second.get_attribute("open") is not None
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_phones_and_screens_in_light_and_dark(
    browser: Any, report: Path, tmp_path: Path, scheme: str, width: int
) -> None:
    page, heard = open_page(browser, report, viewport={"width": width, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing sticks out sideways"
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(14, 17, 22)"}[scheme]
    ink = page.evaluate("getComputedStyle(document.querySelector('figure svg')).fill")
    assert ink == page.evaluate("getComputedStyle(document.body).color"), "figures follow the page"
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000 and heard == []
    page.close()
