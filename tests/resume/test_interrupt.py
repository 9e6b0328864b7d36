"""Ctrl-C and SIGTERM: the current unit is finished and kept, and resuming from there changes nothing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from shortcuts import Command

from sparring.errors import Interrupted
from sparring.loop import play
from sparring.parallel import interrupt
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
UNITS = {
    "a step": "iter-00/.train.partial/metrics.jsonl",
    "a part": "iter-00/.generate.partial/part-00000.parquet",
}


SMALL = {"iterations": 1, "generate": {"max_new_tokens": 6, "batch_size": 4}, "threads": 1}


def weights(root: Path) -> bytes:
    return (root / "iter-00" / "train" / "model" / "model.safetensors").read_bytes()


def when_there(path: Path, number: int, seconds: float = 60) -> int:
    """A child process that signals this one as soon as a file is there."""
    child = os.fork()
    if child == 0:
        deadline = time.monotonic() + seconds
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        os.kill(os.getppid(), number)
        os._exit(0)
    return child


@pytest.mark.parametrize(("unit", "number"), [("a step", signal.SIGTERM), ("a part", signal.SIGINT)])
def test_the_unit_at_hand_is_kept(
    unit: str, number: int, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sparring.stages.generate.stage

    monkeypatch.setattr(sparring.stages.generate.stage, "PART_PROMPTS", 4)
    recipe = make_recipe("spin", train={"batch_size": 4}, **SMALL)
    file = tmp_path / "run" / UNITS[unit]
    child = when_there(file, number)
    with pytest.raises(Interrupted, match="the same command continues") as caught:
        play(recipe, tmp_path / "run")
    os.waitpid(child, 0)
    assert caught.value.number == number
    if unit == "a step":
        checkpoints = list(file.parent.glob("step-*"))
        assert len(checkpoints) == 1, "a step that no interval asked for was kept"
        assert file.read_text().count("\n") == int(checkpoints[0].name[5:])
    else:
        num_parts = len(list(file.parent.glob("part-*.parquet")))
        assert 1 <= num_parts < 12, "48 prompts in parts of 4"
        assert not list(file.parent.glob(".part*"))
    assert signal.getsignal(number) is not interrupt._ask, "the handlers are those from before"
    play(recipe, tmp_path / "run")
    straight = play(recipe, tmp_path / "straight").run
    assert weights(tmp_path / "run") == weights(straight.root)


def test_twice_is_at_once() -> None:
    with pytest.raises(Interrupted), interrupt.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.is_asked()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        raise AssertionError("still here")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_exit_codes(number: int, code: int, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        dump_recipe(make_recipe("spin", train={"batch_size": 4, "epochs": 50}, **SMALL))
    )
    command = Command("run", tmp_path / "recipe.yaml", tmp_path / "run")
    when = tmp_path / "run" / "iter-00" / ".train.partial" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not when.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(command.process, number)
    ended = command.wait()
    said = ended.stderr
    assert ended.returncode == code, said
    assert "Everything up to here is committed, and the same command continues" in said and "Traceback" not in said
