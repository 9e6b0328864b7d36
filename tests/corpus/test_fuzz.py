"""Random input to every reader gives a value or a `UserError`, never a traceback or a hang.

Short here; `tests/soak/fuzz 600` runs longer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparring.data.formats import detect_format, examples, rename_columns
from sparring.data.read import BadRow, Row, read_rows
from sparring.errors import CorruptedError, UserError
from sparring.recipe.load import known_keys, load_recipe
from sparring.recipe.schema import SECTIONS
from sparring.run.manifest import MANIFEST, begin_work, commit, read_manifest, verify
from sparring.run.session import load_sealed_recipe

SECONDS = float(os.environ.get("SPARRING_FUZZ_SECONDS", "0"))
EXAMPLES = 60
ONE_EXAMPLE_SECONDS = 10.0

WORDS = """
    messages conversations prompt completion chosen real instruction input output history system question answer
    text role content from value type
"""
NAMES = WORDS.split()
MARKS = [
    ": ",
    "\n",
    "\n  ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    ",",
    "\t",
    "#",
    "'",
    '"',
    "|",
    ">",
    "---",
    "? ",
    "&a ",
    "*a",
    "!!int ",
]

words = st.sampled_from([*known_keys(), *SECTIONS, "spin", "tspin", "model", "null", "true", ".nan", "5e-7"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | words
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(words | st.text(max_size=8), v, max_size=5)
)
settings_of_a_recipe = st.dictionaries(words, values, max_size=8)
yaml_like = st.lists(words | st.sampled_from(MARKS) | st.text(max_size=4), max_size=40).map("".join)
parts_of_rows = scalars | st.sampled_from(["user", "assistant", "system", "text", "gpt", "human"])
rows = st.dictionaries(
    st.sampled_from(NAMES) | st.text(max_size=5),
    st.recursive(
        parts_of_rows,
        lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(NAMES), v, max_size=4),
        max_leaves=12,
    ),
    max_size=6,
)
files = (
    st.lists((rows | values).map(lambda row: json.dumps(row).encode()) | st.binary(max_size=40), max_size=6).map(
        b"\n".join
    )
    | st.lists(rows, max_size=4).map(lambda found: json.dumps(found).encode())
    | st.binary(max_size=200)
)


def fuzz(strategy: st.SearchStrategy, check: Callable) -> int:
    """Runs `check` on EXAMPLES examples, and on more until SECONDS of CPU time. Returns their number."""
    count, until = 0, time.process_time() + SECONDS

    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def batch(value: object) -> None:
        nonlocal count
        count += 1
        began = time.process_time()
        check(value)
        assert time.process_time() - began < ONE_EXAMPLE_SECONDS

    batch()
    while time.process_time() < until:
        batch()
    print(f"{count} examples")
    return count


def test_recipes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    def check(content: bytes | dict | str) -> None:
        overrides: list[str] = []
        if isinstance(content, dict):  # JSON is YAML
            overrides = [f"{key}={json.dumps(value)}" for key, value in content.items()]
            content = json.dumps({"model": "m", "method": "spin", "data": {"train": "x.jsonl"}, **content})
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        for overridden in ((), overrides):
            try:
                load_recipe(path, overridden)
            except UserError as refusal:
                assert str(refusal)
        with pytest.raises(UserError):
            load_sealed_recipe(path)

    assert fuzz(settings_of_a_recipe | yaml_like | st.text(max_size=80) | st.binary(max_size=80), check) >= EXAMPLES


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            for number, row in read_rows(str(path)):
                assert number > 0
                if not isinstance(row, BadRow):
                    use(row)
        except UserError as refusal:
            assert str(path) in str(refusal)

    assert fuzz(files, check) >= EXAMPLES


def use(row: Row) -> None:
    try:
        row_format = detect_format(row, {}, "sentence", "rows")
        for example in examples(rename_columns(row, {}), 1, row_format, "all"):
            assert example.answer
    except (BadRow, UserError) as problem:
        assert str(problem)


def test_rows() -> None:
    assert fuzz(rows, use) >= EXAMPLES


def test_manifests(tmp_path: Path) -> None:
    folder = tmp_path / "stage"
    with commit(folder) as work:
        (work / "a.txt").write_text("a")
    good = (folder / MANIFEST).read_bytes()

    def check(content: bytes | tuple[int, int, bytes]) -> None:
        if isinstance(content, tuple):
            start, length, put = content
            content = good[:start] + put + good[start + length :]
        (folder / MANIFEST).write_bytes(content)
        if content == good:
            verify(folder)
            return
        with pytest.raises(CorruptedError):
            read_manifest(folder)
        note = begin_work(tmp_path / "work", {"a": "b"}) / ".input_digests.json"
        note.write_bytes(content)
        begin_work(tmp_path / "work", {"a": "b"})
        assert note.read_bytes() != content, "partial work with an invalid note is discarded"

    edits = st.tuples(st.integers(0, len(good)), st.integers(0, 20), st.binary(max_size=20))
    assert fuzz(edits | st.binary(max_size=100), check) >= EXAMPLES
