"""Every command of the README and of docs/ is executed here, on a tiny run; what needs other hardware is parsed.

A fenced block after `<!-- parsed, not run: WHY -->` is parsed: its options must exist, its recipe must be valid with
its overrides. Without that line every `sparring` command is run, except those that other tests play for long (LONG).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import dropwhile, pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

from sparring import cli
from sparring.loop import play
from sparring.recipe import yaml
from sparring.recipe.load import dump_recipe, load_recipe
from sparring.recipe.schema import Adapter, Recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(<!--(?P<mark>[^\n]*)-->\n)?( *)```(?P<kind>\w*)\n(?P<text>.*?)^ *```", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    (sparring .*)$", re.MULTILINE)

LONG = {
    "compare": "commands/test_compare",
    "demo": "commands/test_demo",
    "launch": "commands/test_jobs",
    "judge": "stages/test_mt_bench",
    "tune": "commands/test_tune",
}
"""Commands that need a cluster or a judge, or play for minutes, and the tests that run them."""

OTHERS = {"cd", "git", "vllm", "tensorboard", "trackio", "jq", "python", "ray", "sbatch", "kubectl", "pre-commit"}
"""Programs that are not ours."""

CHECKED = {"sparring", "make", "pip"}


@dataclass(frozen=True)
class Command:
    page: str
    words: tuple[str, ...]
    is_run: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands(page: Path) -> Iterator[Command]:
    text = page.read_text()
    blocks = [(m["mark"] or "", m["text"]) for m in BLOCK.finditer(text) if m["kind"] in ("", "sh", "bash", "console")]
    blocks += [("", m[1]) for m in INDENTED.finditer(BLOCK.sub("", text))]
    for mark, block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            if not re.match(r" *[a-z][a-z-]* ?", line) or line.lstrip().split()[0] not in {*OTHERS, *CHECKED}:
                continue
            words = shlex.split(line, comments=True)
            ends = [-1, *(n for n, word in enumerate(words) if word in ("&&", "|", ">")), len(words)]
            for begin, end in pairwise(ends):
                if words[begin + 1] in {*OTHERS, *CHECKED}:
                    yield Command(page.name, tuple(words[begin + 1 : end]), "parsed, not run" not in mark)


EVERY = [command for page in PAGES for command in commands(page)]
OURS = {c.words[1:]: c for c in reversed(EVERY) if c.words[0] == "sparring" and len(c.words) > 1}
"""One of each, since pages say the same things."""


@pytest.fixture(scope="module")
def played(make_recipe: Callable[..., Recipe], tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a reader has it: rows, a model, a recipe for them, finished runs of a whole model and an adapter."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(tiny / "model", folder / "FOLDER")
    shutil.copy(tiny / "rows.jsonl", folder / "rows.jsonl")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    before = Path.cwd()
    os.chdir(folder)  # the recipe's paths start there
    try:
        data, train = {"train": "rows.jsonl"}, {"epochs": 1, "learning_rate": 1e-6}
        recipe = make_recipe(
            "space", model="FOLDER", iterations=3, data=data, generate={"max_new_tokens": 8}, train=train, threads=1
        )
        adapted = recipe.model_copy(update={"adapter": Adapter(r=2), "iterations": 1})
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        play("recipe.yaml", "runs/mine")
        play(adapted, "runs/adapted")
        shutil.copytree("runs/mine", "runs/pilot")
    finally:
        os.chdir(before)
    return folder


def answers(command: Command) -> tuple[str, ...]:
    """What `init` would ask for on a terminal."""
    return ("--method", "tspin") if command.words[1] == "init" and "--schema" not in command.words else ()


def parsed(command: Command) -> Any:
    """Fails on options and arguments that the command does not have."""
    group: Any = get_command(cli.app)
    name = command.words[1]
    return group.commands[name].make_context(name, [*command.words[2:], *answers(command)])


@pytest.mark.parametrize("command", [c for c in OURS.values() if c.words[1] != "--help"], ids=str)
def test_every_command_of_ours(
    command: Command,
    played: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    context = parsed(command)
    name, recipe = command.words[1], context.params.get("recipe")
    overrides = context.params.get("overrides") or ()
    if recipe is not None and (ROOT / recipe).is_file():
        load_recipe(ROOT / recipe, overrides)
        return  # of a paper's size, or with the story model of tests/test_recipes.py
    if name in LONG or not command.is_run:
        assert name not in LONG or (ROOT / "tests" / f"{LONG[name]}.py").is_file()
        return
    shutil.copytree(played, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    if name == "init" and recipe is not None:
        Path("recipe.yaml").unlink()
    if "--merge" in command.words:
        shutil.rmtree("runs/mine")
        Path("runs/adapted").rename("runs/mine")
    if name == "run" and overrides:
        shutil.rmtree("runs")
    assert run(*command.words[1:], *answers(command)) == 0, capfd.readouterr().err
    if name == "init" and recipe is not None:
        load_recipe(Path("recipe.yaml"))


def run(*arguments: str) -> int:
    """The command's exit code, in this process."""
    try:
        ended = get_command(cli.app).main(list(arguments), prog_name="sparring", standalone_mode=False)
    except typer.Exit as problem:
        return problem.exit_code
    return ended if isinstance(ended, int) else 0


MISTRAL_7B = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
}

AT_7B = [command for command in OURS.values() if re.search(r"recipes/\S+-7b\.yaml", str(command))]


@pytest.mark.parametrize("command", AT_7B, ids=str)
def test_what_is_proposed_for_7b_fits(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plan` takes the recipe with its overrides. `run` names no GPUs: one of 80 GB, or eight if it starts ranks."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))
    monkeypatch.chdir(ROOT)
    parameters = parsed(command).params
    recipe, overrides = str(parameters["recipe"]), [*(parameters.get("overrides") or ()), f"model={tmp_path}"]
    options = list(dropwhile(lambda word: not word.startswith("--"), command.words))
    if command.words[1] != "plan":
        count = 1 if load_recipe(Path(recipe), overrides).launch == "inline" else 8
        options = ["--gpus", str(count), "--gpu", "h100", "--tokens", "150,256"]
    assert run("plan", recipe, *overrides, "--rows", "50000", *options) == 0
    printed = capsys.readouterr().out
    assert "Memory per device, training" in printed and "DOES NOT FIT" not in printed


def test_a_7b_model_needs_sharding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The control of the test above."""
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL_7B))
    words = [str(ROOT / "recipes" / "spin-zephyr-7b.yaml"), "parallel=ddp", f"model={tmp_path}", "--tokens", "150,256"]
    assert run("plan", *words, "--gpus", "8", "--gpu", "h100") == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_commands_are_found_and_a_wrong_one_is_noticed() -> None:
    assert len(OURS) > 30 and sum(command.is_run for command in OURS.values()) > 20
    wrong = {"runn recipe.yaml": "runn", "status": "Missing", "run recipe.yaml runs/a --resume": "No such option"}
    for words, complaint in wrong.items():
        with pytest.raises(Exception, match=complaint):
            parsed(Command("here", ("sparring", *words.split()), is_run=True))


def test_other_programs_are_what_they_are_called() -> None:
    """Targets of make, extras of pip, scripts of the repository."""
    makefile = (ROOT / "Makefile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    for command in EVERY:
        program, *rest = command.words
        if program == "make":
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in rest), str(command)
        elif program == "pip":
            for extra in re.findall(r"\[(\w+)\]", " ".join(rest)):
                assert f"\n{extra} = [" in project, str(command)
        elif program == "python" and rest and rest[0].endswith(".py"):
            assert (ROOT / rest[0]).is_file(), str(command)


def test_every_piece_of_yaml_and_json_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole recipe is a recipe; a part of one is valid beside the smallest."""
    monkeypatch.chdir(tmp_path)
    checked = 0
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text()):
            if block["kind"] == "json":
                json.loads(block["text"])
            elif block["kind"] == "yaml" and "not a recipe" not in (block["mark"] or ""):
                raw, _ = yaml.parse(block["text"], page.name)
                data = {"train": "rows.jsonl", **(raw.pop("data", None) or {})}
                recipe = Path(f"{page.stem}.yaml")
                recipe.write_text(json.dumps({"model": "FOLDER", "method": "tspin", **raw, "data": data}))
                load_recipe(recipe)
                checked += 1
    assert checked > 8
