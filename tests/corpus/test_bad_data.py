"""Bad data files: one message with file, row and remedy, exit code 2, and no partial run directory."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from .conftest import Refusal, lines, rows

GOOD = rows()[6]
USER = {"role": "user", "content": "2 eggs"}
REMEDY = r"Fix them, or raise data\.max_skipped"


def answer(value: object) -> dict[str, object]:
    return {**GOOD, "answer": value}


def parquet(table: list[dict[str, object]], **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table), buffer, **options)
    return buffer.getvalue()


def turns(*messages: object, at: int = 7) -> bytes:
    good = [{"messages": [USER, {"role": "assistant", "content": f"{i} #### {i}"}]} for i in range(20)]
    return b"\n".join(
        json.dumps({"messages": list(messages)} if i == at - 1 else g).encode() for i, g in enumerate(good)
    )


# name -> (bytes of a .jsonl file, what the message says about row 7)
ROWS = {
    "broken json": (lines(b'{"question": "x", "answer"'), "row 7 .*not valid JSON"),
    "two objects in a line": (lines(b'{"a": 1} {"b": 2}'), "row 7 .*not valid JSON: Extra data"),
    "trailing comma": (lines(b'{"question": "x", "answer": "y",}'), "row 7 .*not valid JSON"),
    "single quotes": (lines(b"{'question': 'x'}"), "row 7 .*not valid JSON"),
    "a nul byte": (lines(b'{"question": "x\0", "answer": "y"}'), "row 7 .*not valid JSON"),
    "nul bytes alone": (lines(b"\0\0\0\0"), "row 7 .*not valid JSON"),
    "latin-1": (lines('{"question": "é", "answer": "y"}'.encode("latin-1")), "row 7 .*utf-8"),
    "a line of utf-16": (lines('{"question": "x"}'.encode("utf-16")), "row 7 .*not valid JSON"),
    "a list": (lines(["x", "y"]), "row 7 .*expected an object with columns, got list"),
    "a number": (lines(7), "row 7 .*got int"),
    "null": (lines(None), "row 7 .*got NoneType"),
    "NaN": (lines(b'{"question": "x", "answer": NaN}'), "row 7 .*not valid JSON: NaN"),
    "Infinity": (lines(b'{"question": "x", "answer": -Infinity}'), "row 7 .*not valid JSON: -Infinity"),
    "a key twice": (lines(b'{"question": "x", "answer": "y", "answer": "z"}'), "row 7 .*duplicate key 'answer'"),
    "a number of 5,000 digits": (lines(b'{"question": "x", "answer": ' + b"9" * 5000 + b"}"), "row 7 .*not valid JSON"),
    "nested too deeply": (lines(b"[" * 100_000), "row 7 .*not valid JSON"),
    "another schema": (lines({"prompt": "x", "completion": "y"}), "row 7 .*'question' is missing"),
    "no answer": (lines({"question": "x"}), "row 7 .*'answer' is missing"),
    "a null answer": (lines(answer(None)), "row 7 .*'answer' is missing"),
    "an empty answer": (lines(answer("")), "row 7 .*the response is empty"),
    "a blank answer": (lines(answer(" \n\t\u00a0\u3000")), "row 7 .*the response is empty"),
    "an invisible answer": (lines(answer("\u200b\ufeff")), "row 7 .*the response is empty"),
    "a boolean answer": (lines(answer(True)), "row 7 .*expected a string, got bool"),
    "an object as answer": (lines(answer({"a": 1})), "row 7 .*expected a string, got dict"),
    "a list of numbers as answer": (lines(answer([1, 2])), "row 7 .*parts that are not text"),
    "a lone surrogate": (lines(answer("\ud800")), "row 7 .*not valid Unicode"),
    "an empty prompt": (lines({**GOOD, "question": " "}), "row 7 .*the prompt is empty"),
    "the same row twice": (lines(rows()[0]), "row 7 .*a duplicate of row 1"),
    "a row of 1 MB": (lines({**GOOD, "question": "eggs " * 200_000}), "row 7 .*leaves no room .*train"),
    "a prompt over the context": (lines({**GOOD, "question": "eggs, " * 60}), "row 7 .*leaves no room"),
    "the last line cut": (lines(GOOD)[:-20], "row 20 .*not valid JSON"),
    "an unknown role": (turns({"role": "wizard", "content": "x"}), "row 7 .*unknown role 'wizard' .known roles"),
    "a role that is a list": (turns({"role": [], "content": "x"}), "row 7 .*unknown role"),
    "no turns": (turns(), "row 7 .*must be a list of turns"),
    "a turn that is a text": (turns("hello"), "row 7 .*turn 1 needs 'role' and 'content'"),
    "a turn without content": (turns({"role": "user"}), "row 7 .*turn 1 needs"),
    "no assistant": (turns(USER), "row 7 .*no assistant turn"),
    "an assistant alone": (turns({"role": "assistant", "content": "x"}), "row 7 .*no assistant turn after a user"),
    "a picture": (
        turns({"role": "user", "content": [{"type": "image", "url": "x"}]}),
        "row 7 .*parts that are not text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_broken_row_is_named(name: str, task: Path, refusal: Refusal) -> None:
    content, message = ROWS[name]
    (task / "rows.jsonl").write_bytes(content)
    output = refusal()
    assert re.search(message, output), output
    assert str(task / "rows.jsonl") in output and re.search(REMEDY, output)


def flipped_parquet() -> bytes:
    """A value page that no longer decompresses."""
    content = bytearray(parquet(rows() * 50, compression="zstd"))
    content[60:90] = bytes(30)
    return bytes(content)


# name -> (file name, bytes, message)
FILES = {
    "empty": ("a.jsonl", b"", "no usable row: it is empty"),
    "blank lines": ("a.jsonl", b"\n \n\n", "no usable row: it is empty"),
    "utf-16": ("a.jsonl", lines(GOOD).decode().encode("utf-16"), "row 1 of .*not valid JSON"),
    "a pretty-printed list": ("a.jsonl", json.dumps(rows(), indent=1).encode(), "row 1 of .*not valid JSON"),
    "gzip": ("a.jsonl.gz", gzip.compress(lines(GOOD)), r"unsupported suffix '\.gz'\. Use"),
    "gzip by another name": ("a.jsonl", gzip.compress(lines(GOOD)), "row 1 of .*not valid JSON"),
    "text": ("a.txt", b"hello", r"unsupported suffix '\.txt'\. Use \.jsonl"),
    "no suffix": ("rows", b"hello", r"unsupported suffix ''\. Use"),
    "json cut": ("a.json", json.dumps(rows()).encode()[:-9], "is not valid JSON"),
    "json lines as json": ("a.json", lines(GOOD), r"is not valid JSON.*rename it to \.jsonl"),
    "a json object": ("a.json", b'{"rows": []}', "contains a dict. Write a list of rows"),
    "json in latin-1": ("a.json", '[{"question": "é"}]'.encode("latin-1"), "is not valid JSON"),
    "json with NaN": ("a.json", b'[{"question": "x", "answer": NaN}]', "is not valid JSON: NaN"),
    "json with a key twice": ("a.json", b'[{"question": "x", "question": "y"}]', "duplicate key 'question'"),
    "json nested too deeply": ("a.json", b"[" * 100_000, "is not valid JSON"),
    "an empty list": ("a.json", b"[]", "no usable row: it is empty"),
    "parquet cut": ("a.parquet", parquet(rows())[:-9], "cannot be read"),
    "parquet of zeros": ("a.parquet", bytes(100), "cannot be read"),
    "parquet with a damaged page": ("a.parquet", flipped_parquet(), "cannot be read"),
    "parquet without rows": ("a.parquet", parquet(rows(1))[:0], "cannot be read"),
    "parquet with other columns": ("a.parquet", parquet([{"x": 1}]), "match no known format .*; messages; .*data.col"),
    "parquet with bytes": ("a.parquet", parquet([{"question": b"x", "answer": b"y"}]), "row 1 .*got bytes"),
    "csv with ragged rows": ("a.csv", b"question,answer\na,b\nc,d,e\n", "cannot be read: .*Row #3"),
    "csv empty": ("a.csv", b"", "cannot be read"),
    "csv in latin-1": ("a.csv", "question,answer\né,b\n".encode("latin-1"), "row 1 .*got bytes|UTF8|utf-8"),
    "csv with a header alone": ("a.csv", b"question,answer\n", "no usable row: it is empty"),
    "other columns": ("a.jsonl", b'{"x": 1}\n', r"the columns of .*a\.jsonl \(x\) match no known format.*data.columns"),
    "plain text without a rule": ("a.jsonl", b'{"text": "a. b"}\n', "Set data.split_on to 'sentence'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(name: str, task: Path, refusal: Refusal) -> None:
    file, content, message = FILES[name]
    (task / file).write_bytes(content)
    output = refusal(f"data.train={task / file}")
    assert re.search(message, output, re.DOTALL), output
    assert file in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train={task}/nowhere.jsonl"], r"nowhere\.jsonl does not exist\. Relative paths start at"),
        (["data.train={task}"], "is not a folder saved by datasets.save_to_disk"),
        (["data.train=some-org/no-such-set"], "'some-org/no-such-set' from the Hub failed"),
        (["data.held_out={task}/nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["data.held_out={task}/rows.jsonl"], "every prompt of .*rows.jsonl is also in data.held_out"),
        (["data.held_out=20"], "leaves none of 20 prompts for training"),
        (["data.held_out=1.0"], "leaves none of 20 prompts for training"),
        (["data.columns={question: wrong}"], "data.columns"),
        (["data.columns={nonsense: answer}"], "data.columns"),
        (["train.max_length=2"], "row 1 .*leaves no room .*train.max_length is 2"),
        (["data.end_token=<|nothing|>"], "the tokenizer has no token '<|nothing|>'"),
        (["data.template=no slot"], "has no {prompt}"),
        (["data.template={% if %}"], "data.template"),
        (["data.split_on=("], "is not a valid regular expression"),
    ],
)
def test_settings_about_data_that_cannot_work(overrides: list[str], message: str, task: Path, refusal: Refusal) -> None:
    output = refusal(*(o.replace("{task}", str(task)) for o in overrides))
    assert re.search(message.replace("|>", r"\|>").replace("<|", r"<\|"), output), output


def test_a_fixed_recipe_starts_in_the_same_directory(task: Path, refusal: Refusal) -> None:
    """A refused run leaves nothing that blocks the next attempt."""
    from sparring.loop import play

    refusal(f"data.train={task / 'nowhere.jsonl'}")
    refusal("train.max_length=2")
    assert play(task / "recipe.yaml", task / "run", ["data.held_out=0"]).run.report.is_file()
