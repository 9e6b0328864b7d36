"""Checks that a page contains only our own elements and script, and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import sparring.report

TAGS = """
    html head meta title style body header nav main section footer a h1 h2 h3 h4 p b i small div table thead tbody tr th
    td figure figcaption details summary pre ul li span script label select option input
    svg g path text defs use clippath rect metadata rdf:rdf cc:work dc:type dc:format dc:creator cc:agent dc:title
    dc:date
"""
ALLOWED = set(TAGS.split())


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(html: str) -> Elements:
    elements = Elements()
    elements.feed(html)
    return elements


def assert_inert(html: str) -> Elements:
    elements = parse(html)
    for tag, attributes in elements.tags:
        assert tag in ALLOWED, tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action"):
                assert value is not None and value.startswith("#"), (tag, name, value)
    policy = next(a["content"] for t, a in elements.tags if t == "meta" and "http-equiv" in a)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert [tag for tag, _ in elements.tags].count("script") == len(scripts) == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert scripts[0] == (Path(sparring.report.__file__).parent / "filter.js").read_text()
    return elements
