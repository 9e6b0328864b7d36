"""The command line as a user meets it: exit codes, messages, and a start without waiting."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from shortcuts import sparring

from sparring import cli, loop
from sparring.loop import play
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def finished(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run and its recipe beside it."""
    folder = tmp_path_factory.mktemp("cli")
    recipe = make_recipe("space", iterations=1, generate={"max_new_tokens": 8}, train={"epochs": 1}, threads=1)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    play(recipe, folder / "run")
    return folder


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['sparring', '--help']\n"
        "from sparring.cli import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'pyarrow', 'matplotlib', 'numpy', 'pydantic'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    names = re.findall(r"^  (\w+)  ", result.stdout.partition("Commands:")[2], re.MULTILINE)
    commands = "run init doctor preview plan launch status report export judge compare tune demo"
    assert sorted(names) == sorted(commands.split())


def test_run_again_says_that_everything_is_done(finished: Path) -> None:
    result = sparring("run", finished / "recipe.yaml", finished / "run")
    assert result.returncode == 0, result.stderr
    assert "Everything was done already" in result.stderr


def test_refusals_are_one_message_and_exit_code_two(finished: Path, tmp_path: Path) -> None:
    text = (finished / "recipe.yaml").read_text()
    (tmp_path / "typo.yaml").write_text(text.replace("epochs:", "epoch:"))
    cases = {
        ("run", tmp_path / "nowhere.yaml", tmp_path / "run"): "nowhere.yaml",
        ("run", tmp_path / "typo.yaml", tmp_path / "run"): "did you mean 'train.epochs'",
        ("run", finished / "recipe.yaml", finished / "run", "train.epochs=2"): "train.epochs is 2, but the run was",
        ("run", finished / "recipe.yaml", tmp_path / "run", "data.train=nowhere.jsonl"): "nowhere.jsonl does not exist",
        ("status", tmp_path): "is not a run directory",
        (
            "run",
            finished / "recipe.yaml",
            finished / "run",
            "--stage",
            "train",
            "--iteration",
            "3",
        ): "iterations 0 to 0",
        ("run", finished / "recipe.yaml", finished / "run", "--stage", "polish"): "no such stage",
        ("compare", finished / "recipe.yaml", tmp_path / "run", "--fractions", "half"): "write comma-separated numbers",
        ("report", tmp_path): "is not a run directory",
        ("export", finished / "run", finished): "exists already",
        ("demo", tmp_path / "demo", "--method", "dpo"): "Use all, tspin, space, spin, sft",
    }
    for arguments, message in cases.items():
        result = sparring(*arguments)
        assert result.returncode == 2, (arguments, result.stderr)
        assert result.stderr.count("error: ") == 1 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "data").exists()


def test_damage_is_exit_code_one(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    file = tmp_path / "run" / "iter-00" / "generate" / "part-00000.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    command = ("run", finished / "recipe.yaml", tmp_path / "run", "--stage")
    result = sparring(*command, "evaluate")
    assert result.returncode == 0, "what is not read is not checked"
    shutil.rmtree(tmp_path / "run" / "iter-00" / "score")
    result = sparring(*command, "score")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("stopped: ") and "part-00000.parquet is corrupted" in result.stderr
    assert "Traceback" not in result.stderr


def test_status_for_people_and_for_programs(finished: Path) -> None:
    people = sparring("status", finished / "run")
    assert people.returncode == 0
    for word in ("space", "generate", "score", "train", "evaluate", "done", "held-out NLL"):
        assert word in people.stdout
    programs = json.loads(sparring("status", finished / "run", "--json").stdout)
    assert programs["method"] == "space" and programs["iterations"] == 1
    assert [(s["iteration"], s["stage"], s["state"]) for s in programs["stages"]] == [
        (-1, "evaluate", "done"),
        (0, "generate", "done"),
        (0, "score", "done"),
        (0, "train", "done"),
        (0, "evaluate", "done"),
    ]
    assert programs["headline"]["chosen_by"] == "held_out_nll"
    assert all(s["seconds"] > 0 for s in programs["stages"])


def test_status_of_a_run_at_work(finished: Path, tmp_path: Path) -> None:
    """While another process holds the run: what it is at, and how far."""
    from sparring.run.results import Results
    from sparring.run.rundir import RunDir

    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iter-00" / "train")
    shutil.rmtree(tmp_path / "run" / "iter-00" / "evaluate")
    work = tmp_path / "run" / "iter-00" / ".train.partial"
    work.mkdir()
    (work / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 1.0}\n{"st')
    with RunDir(tmp_path / "run").own():
        states = {(s.iteration, s.stage): (s.state, s.progress) for s in Results(tmp_path / "run").stages()}
    assert states[0, "train"] == ("running", "2 steps")
    assert states[0, "evaluate"] == ("to do", None)
    assert Results(tmp_path / "run").training(0)[-1]["step"] == 2, "a half-written line is left out"


def test_report_writes_the_file_and_says_where(finished: Path) -> None:
    result = sparring("report", finished / "run")
    assert result.returncode == 0
    assert result.stdout.strip() == str(finished / "run" / "report.html")


def test_init_then_doctor(tiny: Path, tmp_path: Path) -> None:
    asked = sparring("init", tmp_path / "r.yaml", "--model", tiny / "model")
    assert asked.returncode == 2 and "error: --data is missing, and there is no terminal" in asked.stderr
    assert not (tmp_path / "r.yaml").exists()
    assert sparring("init", tiny / "rows.jsonl").returncode == 2, "a file that is there, before any question"
    options = ["--model", tiny / "model", "--data", tiny / "rows.jsonl", "--method", "spin"]
    assert sparring("init", tmp_path / "r.yaml", *options).returncode == 0
    result = sparring("doctor", tmp_path / "r.yaml")
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "This recipe would run.", result.stderr
    result = sparring("doctor", tmp_path / "r.yaml", "data.end_token=nothing")
    assert result.returncode == 2 and result.stdout.splitlines()[-1] == "This recipe would not run."


def test_export(finished: Path, tmp_path: Path) -> None:
    result = sparring("export", finished / "run", tmp_path / "out", "--iteration", "0")
    assert result.returncode == 0 and result.stdout.startswith("iteration 0: "), result.stderr
    result = sparring("export", finished / "run", tmp_path / "pairs", "--pairs")
    assert result.stdout.startswith("48 pairs: ")


def test_what_a_run_writes_is_for_its_owner_only(finished: Path, tmp_path: Path) -> None:
    assert sparring("run", finished / "recipe.yaml", tmp_path / "private").returncode == 0
    for path in (tmp_path / "private", *(tmp_path / "private").rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "doctor", "preview", "plan", "compare"])
def test_commands_read_the_recipe_before_anything_heavy_is_imported(command: str, tmp_path: Path) -> None:
    """A misspelt key is told within two seconds, not after the six that transformers takes."""
    (tmp_path / "typo.yaml").write_text("modle: nowhere\n")
    arguments = [str(tmp_path / "typo.yaml"), *([str(tmp_path / "run")] if command in ("run", "compare") else [])]
    code = (
        f"import sys; sys.argv = ['sparring', {command!r}, *{arguments!r}]\n"
        "from sparring.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print(stop.code, 'transformers' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["2", "False"], result.stderr


def test_one_stage_by_hand(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iter-00" / "evaluate")
    command = ("run", finished / "recipe.yaml", tmp_path / "run", "--stage", "evaluate", "--iteration", "0")
    first, again = sparring(*command), sparring(*command)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr
    assert again.stdout.strip() == "evaluate of iteration 0 is done already" and first.stdout == ""
    assert (tmp_path / "run" / "iter-00" / "evaluate" / "metrics.json").is_file()


def test_init_prints_the_schema() -> None:
    schema = json.loads(sparring("init", "--schema").stdout)
    assert schema["title"] == "sparring recipe" and "train" in schema["properties"]


def test_json_lines_are_asked_for(finished: Path) -> None:
    command = ("run", finished / "recipe.yaml", finished / "run", "--log-format")
    lines = sparring(*command, "json").stderr.splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert [event for event in events if event != "message"] == ["run", "done"]
    assert not sparring(*command, "text").stderr.startswith("{")
    refused = sparring(*command, "xml")
    assert refused.returncode == 2 and refused.stderr.startswith("error: --log-format xml: text or json")


@pytest.mark.slow
def test_the_module_is_the_program(tmp_path: Path) -> None:
    """In a real process: `python -m sparring.cli`."""
    command = [sys.executable, "-m", "sparring.cli", "status", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: ")


def test_only_a_run_says_that_what_was_committed_is_intact(
    finished: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of the operating system, in a command that commits nothing and in a run before and after it began."""

    monkeypatch.setattr(os, "umask", lambda mask: 0)  # of this process

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["sparring", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(str(ended.value.code)), " ".join(capsys.readouterr().err.split())

    init = ("init", tmp_path / "none" / "recipe.yaml", "--model", tiny / "model", "--data", tiny / "rows.jsonl")
    code, text = call(*init)
    assert code == 2 and "No such file or directory" in text and "committed" not in text
    assert "Check that the path exists" in text

    def fail(*anything: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(loop, "prepare", fail)
    code, text = call("run", finished / "recipe.yaml", tmp_path / "new")
    assert code == 2 and "Input/output error" in text and "committed" not in text
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iter-00" / "train")
    monkeypatch.setattr(loop, "launch_stage", fail)
    code, text = call("run", finished / "recipe.yaml", tmp_path / "run")
    assert code == 1 and "stopped: [Errno 5] Input/output error. Everything committed is intact" in text
