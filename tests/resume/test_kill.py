"""Killed anywhere and run again, a run ends with the bytes of one that was never stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

import sparring.stages.generate.stage
from sparring.loop import play
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe
from sparring.run.rundir import RunDir
from sparring.stages.train import checkpoint

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]

CLOCKS = {"seconds", "update_seconds"}

# every place where a run of two iterations can be told to die, and several passes of those that repeat
STAGES = ("data", "evaluate", "generate", "score", "train")
POINTS = [
    "replace-recipe.yaml",
    "replace-env.json",
    *(f"{when}-{what}" for what in STAGES for when in ("before-manifest", "before-rename", "committed")),
    *(f"before-rename-{what}:2" for what in ("generate", "score", "train")),
    "before-rename-evaluate:3",
    *(f"{when}-part:{n}" for when in ("before", "after") for n in (1, 2, 4)),
    "before-manifest-step-00000002",
    "before-rename-step-00000002",
    "committed-step-00000002",
    "before-rename-step-00000004:2",
    *(f"train-step:{n}" for n in (1, 2, 3, 5, 6, 8, 17)),
    "checkpoint:1",
    "checkpoint:3",
    *(f"checkpoint-{what}" for what in ("rank", "metrics")),
    "before-prune:3",
    "model-written",
    "replace-report.html",
]


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe) -> Recipe:
    return make_recipe("spin", generate={"max_new_tokens": 12, "batch_size": 20}, train={"checkpoint_minutes": 0})


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparring.stages.generate.stage, "PART_PROMPTS", 20)


@pytest.fixture(scope="module")
def clean(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The run that nothing disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparring.stages.generate.stage, "PART_PROMPTS", 20)
        return play(recipe, tmp_path_factory.mktemp("clean") / "run").run


def content(run: RunDir) -> dict[str, object]:
    """Everything that a run leaves but clocks: files byte by byte, metrics without their seconds."""
    found: dict[str, object] = {}
    for path in sorted(p for p in run.root.rglob("*") if p.is_file()):
        name = path.relative_to(run.root).as_posix()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]
        elif path.name not in ("MANIFEST.json", "env.json", "report.html", ".lock"):
            found[name] = path.read_bytes()
    return found


def die_at(point: str, recipe: Recipe, folder: Path) -> int:
    """Plays in a child process that dies at `point`; returns its exit status."""
    child = os.fork()
    if child == 0:
        os.environ["SPARRING_FAIL_AT"] = point
        try:
            play(recipe, folder)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("point", POINTS)
def test_dies_at(point: str, recipe: Recipe, clean: RunDir, tmp_path: Path) -> None:
    assert die_at(point, recipe, tmp_path / "run") == 137, "the point was never passed"
    assert content(play(recipe, tmp_path / "run").run) == content(clean)


def test_dies_again_while_it_recovers(recipe: Recipe, clean: RunDir, tmp_path: Path) -> None:
    for point in ("before-part:2", "before-rename-step-00000002", "train-step:1", "committed-train", "train-step:7"):
        assert die_at(point, recipe, tmp_path / "run") == 137
    assert content(play(recipe, tmp_path / "run").run) == content(clean)


CRASH_TEST = Path(__file__).parents[1] / "soak" / "crash_test"


def crash_test(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(CRASH_TEST), *arguments], capture_output=True, text=True, check=False)


def test_is_killed_at_random_moments() -> None:
    """40 real SIGKILLs, whenever they come; also while a run recovers from the one before."""
    result = crash_test("40")
    assert result.returncode == 0, result.stderr + result.stdout
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert found["kills"] >= 40 and found["differing_files"] == [] and len(found["killed_while_at"]) >= 3


def test_control_that_must_fail_at_random_moments() -> None:
    """Samples from a global random state, as most trainers have it: a kill changes them, and the comparison sees it."""
    result = crash_test("12", "--control", "global-rng")
    assert result.returncode == 1 and '"differing_files": [\n' in result.stdout, result.stderr + result.stdout


def test_the_command_line_survives_a_kill(recipe: Recipe, tmp_path: Path) -> None:
    """As a user sees it: the process is killed, the same command ends the run, with the same model as one run."""
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    command = [sys.executable, "-m", "sparring.cli", "run", str(file), str(tmp_path / "run"), "threads=1"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "iter-00" / "generate").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True)
    straight = play(recipe.model_copy(update={"threads": 1}), tmp_path / "straight").run
    one, two = (run.model(1) / "model.safetensors" for run in (RunDir(tmp_path / "run"), straight))
    assert one.read_bytes() == two.read_bytes()


def test_a_damaged_newest_checkpoint_is_passed_over(recipe: Recipe, clean: RunDir, tmp_path: Path) -> None:
    assert die_at("checkpoint-rank:4", recipe, tmp_path / "run") == 137
    work = tmp_path / "run" / "iter-00" / ".train.partial"
    assert sorted(path.name for path in work.glob("step-*")) == ["step-00000002", "step-00000003"]
    for name in ("rank-00000.safetensors", "state.json"):
        damaged = bytearray((work / "step-00000003" / name).read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (work / "step-00000003" / name).write_bytes(damaged)
    assert content(play(recipe, tmp_path / "run").run) == content(clean)


def test_controls_that_must_fail(
    recipe: Recipe, clean: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison can fail: a resume that forgets the moments, and random numbers of another seed, are seen."""
    assert die_at("train-step:4", recipe, tmp_path / "forgets") == 137
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "restore_state", lambda *_: None)
        forgets = play(recipe, tmp_path / "forgets").run
    assert content(forgets) != content(clean)
    other = play(recipe.model_copy(update={"seed": 1}), tmp_path / "other").run
    assert content(other) != content(clean)


@pytest.fixture(scope="module")
def adapted(recipe: Recipe) -> Recipe:
    return Recipe.model_validate({**recipe.model_dump(by_alias=True), "adapter": {"r": 4, "lora_alpha": 8}})


@pytest.fixture(scope="module")
def clean_adapted(adapted: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparring.stages.generate.stage, "PART_PROMPTS", 20)
        return play(adapted, tmp_path_factory.mktemp("clean") / "run").run


@pytest.mark.parametrize("point", ["train-step:3", "committed-train", "train-step:11"])
def test_adapters_die_at(point: str, adapted: Recipe, clean_adapted: RunDir, tmp_path: Path) -> None:
    """In the first iteration, between the two, and in the second, which starts from an adapter."""
    assert die_at(point, adapted, tmp_path / "run") == 137
    assert content(play(adapted, tmp_path / "run").run) == content(clean_adapted)
    assert (clean_adapted.model(1) / "adapter_model.safetensors").is_file()
