"""The data stage: what is kept, what is refused, and that nothing leaks between training and held-out rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from sparring.data.tables import read_rendered
from sparring.errors import UserError
from sparring.objectives import Sft
from sparring.recipe.schema import Recipe
from sparring.run.iteration import DataSummary
from sparring.run.rundir import RunDir
from sparring.stages.prepare import prepare

MakeRecipe = Callable[..., Recipe]


def write(path: Path, rows: Sequence[Mapping[str, object] | str]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def good(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"question": f"{i + 2} eggs, 1 lost", "answer": f"{i + 1} #### {i + 1}"} for i in range(start, start + count)
    ]


def run(tmp_path: Path, recipe: Recipe) -> tuple[RunDir, DataSummary]:
    directory = RunDir(tmp_path / "run")
    return directory, prepare(directory, recipe)


def test_broken_rows_are_counted_listed_and_passed_over(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows: list[Mapping[str, object] | str] = [
        *good(40),
        "{broken",
        {"question": "x", "answer": " "},
        good(1)[0],
        {"q": 1},
    ]
    recipe = make_recipe(data={"train": write(tmp_path / "rows.jsonl", rows), "held_out": 0.1, "max_skipped": 0.2})
    directory, summary = run(tmp_path, recipe)
    assert (summary.num_train, summary.num_held_out) == (36, 4)
    assert sum(summary.skipped.values()) == 4
    listed = [json.loads(line) for line in (directory.data / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["row"], entry["reason"].split(":")[0]) for entry in listed] == [
        (41, "not valid JSON"),
        (42, "the response is empty"),
        (43, "a duplicate of row 1"),
        (44, "'question' is missing"),
    ]
    kept = read_rendered(directory.data / "train.parquet") + read_rendered(directory.data / "held_out.parquet")
    assert sorted(row.row for row in kept) == list(range(1, 41))


def test_too_many_broken_rows_stop_the_run_before_anything_is_written(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*good(8), "{broken", "{broken"])
    with pytest.raises(
        UserError, match=r"2 of 10 rows of .*rows\.jsonl cannot be used: row 9 .*data\.max_skipped \(0\.1\)"
    ):
        run(tmp_path, make_recipe(data={"train": path}))
    assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize("rows", [[], ["{broken"], [{"question": "x", "answer": ""}]])
def test_no_usable_row_is_refused(make_recipe: MakeRecipe, tmp_path: Path, rows: list[str]) -> None:
    with pytest.raises(UserError, match="has no usable row"):
        run(tmp_path, make_recipe(data={"train": write(tmp_path / "rows.jsonl", rows), "held_out": 0}))


def test_held_out_prompts_are_not_in_training(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Two answers to each prompt: both go to the same side."""
    rows = [row for r in good(30) for row in (r, {**r, "answer": r["answer"] + "0"})]
    directory, summary = run(
        tmp_path, make_recipe(data={"train": write(tmp_path / "rows.jsonl", rows), "held_out": 0.2})
    )
    train, held_out = (read_rendered(directory.data / f"{name}.parquet") for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (48, 12) == (summary.num_train, summary.num_held_out)
    assert not {row.prompt for row in train} & {row.prompt for row in held_out}
    assert not {row.id for row in train} & {row.id for row in held_out}


PHASES = {0: {"method": "sft"}}


def test_self_play_rows_are_kept_from_sft(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Two answers to each prompt; a share of what is not held out."""
    rows = [row for r in good(30) for row in (r, {**r, "answer": r["answer"] + "0"})]
    data = {"train": write(tmp_path / "rows.jsonl", rows), "held_out": 0.2, "self_play_rows": 0.25}
    directory, summary = run(tmp_path, make_recipe("space", data=data, per_iteration=PHASES))
    parts = [read_rendered(directory.data / f"{name}.parquet") for name in ("train", "self_play", "held_out")]
    assert [len(part) for part in parts] == [36, 12, 12]
    assert (summary.num_train, summary.num_self_play, summary.num_held_out) == (48, 12, 12)
    assert len({row.prompt for part in parts for row in part}) == 30, "no prompt is on two sides"


def test_a_file_of_self_play_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A separate file keeps its prompts, the held-out one before the one for self-play."""
    other = [{**row, "answer": row["answer"] + "0"} for row in good(20, start=18)]
    data = {
        "train": write(tmp_path / "rows.jsonl", good(20)),
        "held_out": write(tmp_path / "held_out.jsonl", good(10, start=20)),
        "self_play_rows": write(tmp_path / "game.jsonl", other),
    }
    directory, summary = run(tmp_path, make_recipe("space", data=data, per_iteration=PHASES))
    assert (summary.num_train, summary.num_self_play, summary.num_held_out) == (18 + 10, 10, 10)
    assert summary.skipped == {
        "the prompt is also in the self-play data": 2,
        "the prompt is also in the held-out data": 10,
    }
    assert len(read_rendered(directory.data / "self_play.parquet")) == 10


@pytest.mark.parametrize(
    ("amount", "method", "phases", "message"),
    [
        (0.5, "space", {}, "hides rows from sft iterations, so the recipe needs both"),
        (0.5, "sft", {}, "hides rows from sft iterations, so the recipe needs both"),
        (30, "space", PHASES, "data.self_play_rows: 30 leaves none of 20 prompts for training"),
        (0.01, "space", PHASES, "data.self_play_rows: 0.01 leaves no row for self-play"),
    ],
)
def test_self_play_rows_that_cannot_be(
    make_recipe: MakeRecipe, tmp_path: Path, amount: float, method: str, phases: dict[int, object], message: str
) -> None:
    data = {"train": write(tmp_path / "rows.jsonl", good(20)), "held_out": 0, "self_play_rows": amount}
    with pytest.raises(UserError, match=message):
        run(tmp_path, make_recipe(method, data=data, per_iteration=phases))


def test_another_method_of_a_tuning_is_no_sft_phase(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Its arms copy training rows only, so the rows kept for self-play would be lost."""
    data = {"train": write(tmp_path / "rows.jsonl", good(20)), "held_out": 0, "self_play_rows": 0.5}
    with pytest.raises(UserError, match="so the recipe needs both"):
        prepare(RunDir(tmp_path / "run"), make_recipe("space", data=data), [Sft()])


def test_all_turns_of_a_conversation_stay_on_one_side(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    rows = []
    for row in good(20):
        first = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        rows.append(
            {"messages": [*first, {"role": "user", "content": "1 more"}, {"role": "assistant", "content": "2"}]}
        )
    recipe = make_recipe(data={"train": write(tmp_path / "rows.jsonl", rows), "held_out": 5, "turns": "all"})
    directory, _ = run(tmp_path, recipe)
    train, held_out = (read_rendered(directory.data / f"{name}.parquet") for name in ("train", "held_out"))
    assert (len(train), len(held_out)) == (30, 10)
    assert not {row.row for row in train} & {row.row for row in held_out}
    assert len({row.prompt_key for row in held_out}) == 5, "the clusters of the intervals"


def test_a_held_out_file_keeps_its_prompts(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Two of twelve are training rows, whatever their answers: they leave the training rows, and are counted."""
    for name, answer in (("same", ""), ("other", "0")):
        held_out = [{**row, "answer": row["answer"] + answer} for row in good(12, start=18)]
        data = {
            "train": write(tmp_path / f"{name}-train.jsonl", good(20)),
            "held_out": write(tmp_path / f"{name}-held-out.jsonl", held_out),
        }
        directory = RunDir(tmp_path / name)
        summary = prepare(directory, make_recipe(data=data))
        assert (summary.num_train, summary.num_held_out) == (18, 12)
        assert summary.skipped == {"the prompt is also in the held-out data": 2}
        listed = [json.loads(line) for line in (directory.data / "skipped.jsonl").read_text().splitlines()]
        assert [(entry["file"], entry["row"]) for entry in listed] == [(data["train"], 19), (data["train"], 20)]


def test_a_held_out_file_with_every_training_prompt_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    other = [{**row, "answer": row["answer"] + "0"} for row in good(20)]
    train, held_out = write(tmp_path / "a.jsonl", good(20)), write(tmp_path / "b.jsonl", other)
    for file in (train, held_out):
        with pytest.raises(UserError, match=r"every prompt of .*a\.jsonl is also in data\.held_out"):
            run(tmp_path, make_recipe(data={"train": train, "held_out": file}))


def test_a_refusal_names_the_file_that_it_is_about(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Its own rows and its own count, although the other file has bad rows too."""
    train = write(tmp_path / "a.jsonl", [*good(20), good(1)[0]])
    held_out = write(tmp_path / "b.jsonl", [*good(4, start=20), "{broken", good(1, start=20)[0]])
    message = r"2 of 6 rows of .*b\.jsonl cannot be used: row 5 of .*b\.jsonl: not valid JSON.* \(and 1 more\)\. Fix"
    with pytest.raises(UserError, match=message):
        run(tmp_path, make_recipe(data={"train": train, "held_out": held_out}))


NEAR = ["{}  ", " {}\n", "{}", "{}", "{}"]


def near(count: int) -> list[dict[str, object]]:
    """The same questions with other white space, case and system prompt, and other answers."""
    return [
        {
            "question": NEAR[i % len(NEAR)].format(row["question"].upper() if i % 2 else row["question"]),
            "answer": row["answer"] + "0",
            "system": "Be brief." if i % len(NEAR) == 4 else None,
        }
        for i, row in enumerate(good(count))
    ]


def test_near_duplicates_stay_on_one_side(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*good(30), *near(30)])
    directory, summary = run(tmp_path, make_recipe(data={"train": path, "held_out": 10}))
    train, held_out = (read_rendered(directory.data / f"{name}.parquet") for name in ("train", "held_out"))
    numbers = [{(row.row - 1) % 30 for row in part} for part in (train, held_out)]
    assert (len(train), len(held_out)) == (40, 20) and not numbers[0] & numbers[1]
    assert summary.num_near_duplicates == 24, "six of thirty are the same to the letter"


def test_near_duplicates_of_a_held_out_file_leave_the_training_rows(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    data = {
        "train": write(tmp_path / "rows.jsonl", [*good(20, start=10), *near(10)]),
        "held_out": write(tmp_path / "held_out.jsonl", good(10)),
    }
    _, summary = run(tmp_path, make_recipe(data=data))
    assert (summary.num_train, summary.num_held_out) == (20, 10)
    but = " but for case, white space, Unicode form or system prompt"
    assert summary.skipped == {
        f"the prompt is also in the held-out data{but}": 8,
        "the prompt is also in the held-out data": 2,
    }


def test_a_share_of_nothing_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", good(9))
    with pytest.raises(UserError, match=r"data\.held_out: 0\.05 of 9 prompts rounds to 0\. Set a number of them, or 0"):
        run(tmp_path, make_recipe(data={"train": path, "held_out": 0.05}))


def test_a_checker_with_nothing_to_check_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Before anything is generated: without it, the report of the finished run would have no accuracy to show."""
    rows = [{**row, "answer": "no number"} for row in good(20)]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        UserError, match=r"evaluate\.checker: number finds no right answer in any of 5 held-out rows.*'no number'"
    ):
        run(tmp_path, make_recipe(data={"train": path, "held_out": 5}))
    rows = [*good(10), *({**row, "answer": "no number"} for row in good(20, start=10))]
    recipe = make_recipe(data={"train": path, "held_out": write(tmp_path / "b.jsonl", rows[5:15])})
    write(tmp_path / "rows.jsonl", rows[15:])
    _, summary = run(tmp_path, recipe)
    assert (summary.num_checked, summary.num_held_out) == (5, 10)


def test_what_the_template_leaves_out_is_counted(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    turns = [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"], "avatar": "x"}]
        for row in good(20)
    ]
    system = {"role": "system", "content": "2 eggs"}
    path = write(
        tmp_path / "rows.jsonl", [{"messages": [system, *one] if i < 8 else one} for i, one in enumerate(turns)]
    )
    without_system = (
        "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    _, summary = run(tmp_path, make_recipe(data={"train": path, "held_out": 5, "template": without_system}))
    assert summary.left_out == {"a turn of the system": 8, "'avatar' of a turn": 20}


def test_the_split_is_a_function_of_the_rows_and_the_seed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path, turned = write(tmp_path / "rows.jsonl", good(30)), write(tmp_path / "turned.jsonl", good(30)[::-1])

    def held_out(source: str, seed: int, name: str) -> set[str]:
        directory = RunDir(tmp_path / name)
        prepare(directory, make_recipe(data={"train": source, "held_out": 6}, seed=seed))
        return {row.id for row in read_rendered(directory.data / "held_out.parquet")}

    assert held_out(path, 0, "a") == held_out(turned, 0, "b") != held_out(path, 1, "c")


def test_limits(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", good(30))
    _, summary = run(tmp_path, make_recipe(data={"train": path, "held_out": 0, "limit": 10}))
    assert (summary.num_train, summary.num_held_out) == (10, 0)
    with pytest.raises(UserError, match="leaves none of 30 prompts"):
        prepare(RunDir(tmp_path / "other"), make_recipe(data={"train": path, "held_out": 30}))


def test_real_answers_are_cut_where_generated_ones_are(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", good(20))
    directory, summary = run(tmp_path, make_recipe(data={"train": path, "held_out": 0}, generate={"max_new_tokens": 2}))
    rows = read_rendered(directory.data / "train.parquet")
    assert summary.num_truncated == 20
    assert all(len(row.real_ids) == 2 and row.real_finish == "length" for row in rows)
    other = make_recipe(data={"train": path, "held_out": 0, "truncate_real": False}, generate={"max_new_tokens": 2})
    assert prepare(RunDir(tmp_path / "whole"), other).num_truncated == 0


def test_the_summary_reads_back(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    directory, summary = run(tmp_path, make_recipe())
    assert DataSummary.read(directory.data / "summary.json") == summary
    assert summary.end_token == "<|end|>" and summary.end_ids == (3,)
    assert summary.format == "question/answer"


def test_a_context_shorter_than_the_setting_counts(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    _, summary = run(tmp_path, make_recipe(train={"max_length": 4096}))
    assert summary.max_length == 128, "the tiny model's context"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "nowhere"}, "there is no folder .*/nowhere"),
        ({"model": "."}, r"has no config\.json"),
        ({"data": {"train": "nowhere.jsonl"}}, r".*/nowhere\.jsonl does not exist"),
    ],
)
def test_what_is_not_there_is_refused(
    make_recipe: MakeRecipe, tmp_path: Path, change: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(tmp_path, make_recipe(**change))


def test_weights_that_can_run_code_are_refused(make_recipe: MakeRecipe, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((tiny / "model" / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"pytorch_model\.bin can run code when it is read: convert it to safetensors"):
        run(tmp_path, make_recipe(model=str(folder)))
