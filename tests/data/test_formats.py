"""Every supported format gives the same conversations, and every bad row gives a reason."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sparring.data.formats import detect_format, examples, prompt_key, rename_columns
from sparring.data.read import BadRow, read_rows
from sparring.errors import UserError

Q, A = "What is 2+2?", "4"


def turns(row: Mapping[str, object], which: str = "last", **settings: object) -> list[list[tuple[str, str]]]:
    columns = settings.pop("columns", {})
    row_format = detect_format(row, columns, settings.pop("split_on", None), "rows")  # type: ignore[arg-type]
    found = examples(rename_columns(row, columns), 1, row_format, which)  # type: ignore[arg-type]
    return [[(m["role"], m["content"]) for m in example.messages] for example in found]


ONE = [("user", Q), ("assistant", A)]
SYSTEM = [("system", "Be brief."), *ONE]
TURNS = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]}, ONE),
        ({"prompt": Q, "completion": A}, ONE),
        ({"prompt": [{"role": "user", "content": Q}], "completion": [{"role": "assistant", "content": A}]}, ONE),
        ({"prompt": Q, "chosen": A, "rejected": "5"}, ONE),
        ({"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "5"}]}, ONE),
        ({"messages": TURNS, "system": "Be brief."}, SYSTEM),
        ({"messages": [{"role": "system", "content": "Be brief."}, *TURNS], "system": "Be brief."}, SYSTEM),
        (
            {
                "prompt": Q,
                "chosen": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}],
                "rejected": [],
            },
            ONE,
        ),
        ({"real": [{"role": "user", "content": Q}, {"role": "assistant", "content": A}], "generated": []}, ONE),
        ({"instruction": Q, "input": "", "output": A}, ONE),
        ({"instruction": "Add.", "input": "2+2", "output": A}, [("user", "Add.\n\n2+2"), ("assistant", A)]),
        ({"instruction": Q, "output": A, "system": "Be brief."}, SYSTEM),
        ({"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]}, ONE),
        (
            {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}], "system": "Be brief."},
            SYSTEM,
        ),
        ({"question": Q, "answer": A}, ONE),
        ({"question": Q, "answer": 4}, ONE),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "value": "What is "}, {"type": "text", "text": "2+2?"}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": A}]},
                ]
            },
            ONE,
        ),
    ],
)
def test_formats(row: Mapping[str, object], expected: list[tuple[str, str]]) -> None:
    assert turns(row) == [expected]


@pytest.mark.parametrize(
    ("rejected", "expected"),
    [
        ("5", "5"),
        ([{"role": "user", "content": Q}, {"role": "assistant", "content": "5"}], "5"),
        ([{"role": "user", "content": "another prompt"}, {"role": "assistant", "content": "5"}], None),
        (" ", None),
        ([], None),
        (None, None),
    ],
)
def test_the_rejected_response_of_a_pair(rejected: object, expected: str | None) -> None:
    row = {"prompt": Q, "chosen": A, "rejected": rejected}
    (example,) = examples(row, 1, detect_format(row, {}, None, "rows"), "last")
    assert example.rejected == (expected and {"role": "assistant", "content": expected})


def test_ultrafeedback_s_own_columns_are_pairs() -> None:
    """`messages` repeats `chosen`; read as such, no row has a rejected response."""
    pair = {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "5"}]}
    row = {"prompt": Q, "prompt_id": "a", **pair, "messages": TURNS, "score_chosen": 8.0, "score_rejected": 2.0}
    row_format = detect_format(row, {}, None, "rows")
    (example,) = examples(row, 1, row_format, "last")
    assert row_format.name == "prompt/chosen" and example.answer == A
    assert example.rejected == {"role": "assistant", "content": "5"}
    assert detect_format(row, {"messages": "messages"}, None, "rows").name == "messages", "unless the recipe maps it"


def test_turns_that_are_not_trained_are_context() -> None:
    said = [
        ("user", "u1"),
        ("assistant", "a1"),
        ("user", "u2"),
        ("assistant", "a2"),
        ("user", "u3"),
        ("assistant", "a3"),
    ]
    messages: list[dict[str, object]] = [{"role": role, "content": content} for role, content in said]
    messages[1] |= {"weight": 0}
    messages[5] |= {"train": False}
    messages[3] |= {"weight": 1, "train": None}
    row = {"messages": messages}
    assert turns(row, "all") == turns(row, "last") == turns(row, "first") == [said[:4]]
    shares = {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A, "weight": 0.0}]}
    with pytest.raises(BadRow, match="no assistant turn to train: each has weight 0 or train false"):
        turns(shares)


def test_calls_thoughts_and_tools_are_kept() -> None:
    call = {"name": "add", "arguments": '{"a": 2, "b": 2}'}
    row = {
        "messages": [
            TURNS[0],
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "function": call}], "thinking": "hm"},
            {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "add", "avatar": "a.png"},
            {"role": "assistant", "content": A, "tool_calls": [], "reasoning_content": "so", "name": None},
        ],
        "tools": '[{"type": "function", "function": {"name": "add"}}]',
    }
    (example,) = examples(row, 1, detect_format(row, {}, None, "rows"), "last")
    called = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    assert example.messages[1:] == (
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [called]},
        {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"},
        {"role": "assistant", "content": A, "reasoning_content": "so"},
    )
    assert example.tools == ({"type": "function", "function": {"name": "add"}},)
    assert example.left_out == ("'avatar' of a turn",)
    (other,) = examples({**row, "tools": None}, 1, detect_format(row, {}, None, "rows"), "last")
    assert other.id != example.id, "tools are part of the prompt"


def test_arrow_s_nulls_are_not_arguments(tmp_path: Path) -> None:
    """Arrow gives every object of a column the fields of all others."""
    calls = [{"function": {"name": name, "arguments": {name: 1}}} for name in ("a", "b")]
    rows = [{"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [call]}]} for call in calls]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for number, row in read_rows(str(tmp_path / "rows.parquet")):
        assert isinstance(row, dict)
        (example,) = examples(row, number, detect_format(row, {}, None, "rows"), "last")
        name = "ab"[number - 1]
        assert example.messages[-1]["tool_calls"][0]["function"] == {"name": name, "arguments": {name: 1}}
        assert example.left_out == ()


def test_alpaca_history_becomes_turns() -> None:
    row = {"instruction": Q, "output": A, "history": [["Hi", "Hello"]]}
    assert turns(row) == [[("user", "Hi"), ("assistant", "Hello"), *ONE]]


def test_which_turns_become_examples() -> None:
    conversation = [
        ("system", "s"),
        ("user", "u1"),
        ("assistant", "a1"),
        ("user", "u2"),
        ("assistant", "a2"),
        ("user", "u3"),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in conversation]}
    assert turns(row, "last") == [conversation[:5]]
    assert turns(row, "first") == [conversation[:3]]
    assert turns(row, "all") == [conversation[:3], conversation[:5]]


def test_an_assistant_turn_before_any_user_turn_is_not_a_target() -> None:
    row = {
        "messages": [
            {"role": "assistant", "content": "Welcome!"},
            {"role": "user", "content": Q},
            {"role": "assistant", "content": A},
        ]
    }
    assert turns(row, "all") == [[("assistant", "Welcome!"), *ONE]]


def test_text_is_split_by_rule() -> None:
    text = 'One day, "Stop!" she said. Then it rained. The end.'
    assert turns({"text": text}, split_on="sentence")[0] == [
        ("user", 'One day, "Stop!"'),
        ("assistant", " she said. Then it rained. The end."),
    ]
    assert turns({"text": "Q: a\nA: b"}, split_on="\nA:")[0] == [("user", "Q: a"), ("assistant", "\nA: b")]
    with pytest.raises(BadRow, match="matches nothing in the text"):
        turns({"text": "nothing here"}, split_on="sentence")
    with pytest.raises(UserError, match=r"Set data\.split_on"):
        turns({"text": text})


def test_columns_are_mapped() -> None:
    row = {"q": Q, "a": A, "text": "something else"}
    assert turns(row, columns={"question": "q", "answer": "a"}) == [ONE]
    assert turns({"story": "A b. C d."}, columns={"text": "story"}, split_on="sentence")[0][0] == ("user", "A b.")
    with pytest.raises(UserError, match="has no column 'x'. It has q, a"):
        turns({"q": Q, "a": A}, columns={"question": "x"})
    with pytest.raises(UserError, match="unknown name 'quest'"):
        turns({"q": Q, "a": A}, columns={"quest": "q"})


def test_unknown_columns_are_refused_with_the_supported_ones() -> None:
    with pytest.raises(UserError, match=r"\(foo, bar\) match no known .*question \+ answer.*data\.columns"):
        turns({"foo": 1, "bar": 2})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": Q, "answer": "  \n"}, "the response is empty"),
        ({"question": " ", "answer": A}, "the prompt is empty"),
        ({"question": Q, "answer": None}, "'answer' is missing"),
        ({"question": Q, "answer": ["x"]}, "not text"),
        ({"question": Q, "answer": True}, "expected a string, got bool"),
        ({"question": Q, "answer": "\ud800"}, "not valid Unicode"),
        ({"messages": []}, "must be a list of turns"),
        ({"messages": "hi"}, "must be a list of turns"),
        ({"messages": [{"role": "user", "content": Q}]}, "no assistant turn"),
        ({"messages": [{"role": "robot", "content": Q}]}, "unknown role 'robot'"),
        ({"messages": [{"content": Q}]}, "turn 1 needs 'role' and 'content'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "url": "x"}]},
                    {"role": "assistant", "content": A},
                ]
            },
            "parts that are not text",
        ),
        ({"instruction": Q, "output": A, "history": [["a"]]}, "'history' must be"),
        ({"messages": [{**TURNS[0], "weight": 1}, TURNS[1]]}, "turn 1 of the user has weight 1, but only assistant"),
        ({"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}, "turn 2 has weight 0.5. Use 0 or 1"),
        ({"messages": [TURNS[0], {**TURNS[1], "train": "no"}]}, "turn 2 has train 'no'. Use true or false"),
        ({"messages": [TURNS[0], {**TURNS[1], "function_call": {"name": "f"}}]}, "Write it as 'tool_calls'"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"name": ""}, 1]}]}, "needs a function with a name"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"name": "f", "arguments": "[1"}]}]}, "not valid JSON"),
        ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"name": "f", "arguments": "1"}]}]}, "must be an object"),
        ({"messages": [{**TURNS[0], "reasoning_content": "x"}, TURNS[1]]}, "turn 1 of the user has a thought"),
        ({"messages": TURNS, "tools": "[{}]"}, "must be a list of JSON schemas"),
        ({"messages": [{"role": "system", "content": "a"}, *TURNS], "system": "b"}, "Keep one of them"),
    ],
)
def test_broken_rows_say_why(row: Mapping[str, object], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        turns(row)


def test_ids_are_of_the_content() -> None:
    row_format = detect_format({"question": Q, "answer": A}, {}, None, "rows")
    first = examples({"question": Q, "answer": A}, 1, row_format, "last")[0]
    moved = examples({"answer": A, "question": Q, "extra": 1}, 99, row_format, "last")[0]
    other = examples({"question": Q, "answer": "5"}, 1, row_format, "last")[0]
    assert first.id == moved.id != other.id
    assert prompt_key(first) == prompt_key(other), "answers to one prompt stay on one side of the split"


def test_files_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(r).encode() for r in rows))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "e.csv").write_text("question,answer\n" + "".join(f"{r['question']},x{r['answer']}\n" for r in rows))
    for name in ("a.jsonl", "b.jsonl", "c.json", "d.parquet"):
        assert list(read_rows(str(tmp_path / name))) == list(enumerate(rows, start=1)), name
    assert [row["answer"] for _, row in read_rows(str(tmp_path / "e.csv"))] == [f"x{i}" for i in range(5)]  # type: ignore[index]


def test_a_saved_dataset_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(5)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "plain")
    DatasetDict({"train_sft": Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
    assert list(read_rows(str(tmp_path / "plain"))) == list(enumerate(rows, start=1))
    assert list(read_rows(str(tmp_path / "splits"), "train_sft")) == list(enumerate(rows, start=1))
    with pytest.raises(UserError, match="no split 'train'. Set data.split to one of train_sft"):
        read_rows(str(tmp_path / "splits"))


def test_broken_lines_keep_their_numbers(tmp_path: Path) -> None:
    good = b'{"question": "a\xe2\x80\xa8b", "answer": "1"}'  # U+2028 inside a string is not a line break
    lines = [good, b"", b"{broken", b"[1]", b'{"question": "\xff"}', good]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    found = dict(read_rows(str(tmp_path / "rows.jsonl")))
    assert sorted(found) == [1, 3, 4, 5, 6]
    assert "not valid JSON" in str(found[3]) and "list" in str(found[4]) and "utf-8" in str(found[5])
    assert found[6] == {"question": "a\u2028b", "answer": "1"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.txt", "x", "unsupported suffix '.txt'. Use .jsonl"),
        ("rows.json", '{"a": 1}', "Write a list of rows"),
        ("rows.json", '{"a": 1}\n{"a": 2}\n', "rename it to .jsonl"),
        ("rows.parquet", "no parquet", "cannot be read"),
        ("folder/", "", "not a folder saved by datasets"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_rows(str(tmp_path / name)))


def test_a_missing_file_is_named_with_its_full_path(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}/rows.jsonl does not exist"):
        read_rows(str(tmp_path / "rows.jsonl"))
