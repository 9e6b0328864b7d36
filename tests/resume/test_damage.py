"""Rotten and torn files: every cut and every flipped bit is found before use, and what can be made again is."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import sparring.loop
import sparring.run.manifest
import sparring.run.session
from sparring.errors import CorruptedError, UserError
from sparring.loop import play
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.report import write_report
from sparring.run.manifest import commit_part, has_part
from sparring.run.rundir import RunDir
from sparring.stages.train.checkpoint import Checkpointer

pytestmark = pytest.mark.slow

CUTS = FLIPS = 50

# kind of artifact -> where a run keeps it
KINDS = {
    "parquet": ("**/*.parquet",),
    "safetensors": ("**/*.safetensors",),
    "manifest": ("**/MANIFEST.json",),
    "json": ("data/*.json*", "*/evaluate/metrics.json", "iter-00/train/**/*.json*"),
}
STAGE_FUNCTIONS = ("prepare", "launch_stage")


class MadeAgain(Exception):
    """In place of a stage: it was found damaged, and would be made again."""


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    rows = {"held_out": 8, "limit": 24}
    return make_recipe("spin", iterations=1, data=rows, generate={"max_new_tokens": 4}, train={"epochs": 1})


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return play(recipe, tmp_path_factory.mktemp("damage") / "run").run


def files(run: RunDir, kind: str) -> list[Path]:
    found = sorted(p for pattern in KINDS[kind] for p in run.root.glob(pattern) if p.stat().st_size)
    return [p for p in found if kind == "manifest" or p.name != "MANIFEST.json"]


def damages(content: bytes, source: random.Random, cuts: int, flips: int) -> Iterator[bytes]:
    yield from (content[: source.randrange(len(content))] for _ in range(cuts))
    for _ in range(flips):
        damaged, bit = bytearray(content), source.randrange(8 * len(content))
        damaged[bit // 8] ^= 1 << bit % 8
        yield bytes(damaged)


def hundred(paths: list[Path], seed: int) -> Iterator[tuple[Path, bytes]]:
    """50 cuts and 50 flips, spread over files of one kind; each file is whole again after its turn."""
    source = random.Random(seed)
    for number, path in enumerate([paths[i % len(paths)] for i in range(CUTS + FLIPS)]):
        content = path.read_bytes()
        is_cut = number < CUTS
        yield path, next(damages(content, source, cuts=is_cut, flips=not is_cut))
        path.write_bytes(content)


def restore(run: RunDir) -> None:
    for aside in run.root.rglob("*.damaged-*"):
        whole = aside.with_name(aside.name.partition(".damaged-")[0])
        if whole.exists():
            whole.unlink()
        aside.rename(whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_finds_every_damaged_artifact(
    kind: str, recipe: Recipe, finished: RunDir, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def made_again(*_: object) -> None:
        raise MadeAgain

    for name in STAGE_FUNCTIONS:
        monkeypatch.setattr(sparring.loop, name, made_again)
    found = 0
    for path, damaged in hundred(files(finished, kind), seed=1):
        path.write_bytes(damaged)
        with pytest.raises(MadeAgain):
            play(recipe, finished.root)
        assert str(path) in capfd.readouterr().err, "the message names the file"
        restore(finished)
        found += 1
    assert found == 100
    play(recipe, finished.root)  # whole again: nothing is made again


@pytest.mark.parametrize("name", ["recipe.yaml", "env.json"])
def test_a_run_s_own_notes_are_sealed(name: str, recipe: Recipe, finished: RunDir) -> None:
    path = finished.root / name
    found = 0
    for _, damaged in hundred([path], seed=2):
        path.write_bytes(damaged)
        if name == "recipe.yaml":  # the only witness of the settings: refused by name
            with pytest.raises(UserError, match=r"recipe\.yaml (is corrupted|cannot be read).*Restore its text"):
                play(recipe, finished.root)
            with pytest.raises(UserError, match=r"recipe\.yaml"):
                write_report(finished)
        else:  # a log: kept aside, and a new one is started
            sparring.run.session.record_session(finished)
            assert len(json.loads(path.read_text())["sessions"]) == 1
            restore(finished)
        found += 1
    assert found == 100


@pytest.mark.parametrize(
    "name",
    [
        "data/train.parquet",
        "data/MANIFEST.json",
        "iter-00/generate/part-00000.parquet",
        "iter-00/score/opponent.parquet",
        "iter-00/train/model/model.safetensors",
        "iter-00/train/MANIFEST.json",
        "iter-00/evaluate/metrics.json",
    ],
)
def test_what_is_made_again_is_the_same(name: str, recipe: Recipe, finished: RunDir, tmp_path: Path) -> None:
    root = shutil.copytree(finished.root, tmp_path / "run")
    expected = (root / name).read_bytes()
    (root / name).write_bytes(next(damages(expected, random.Random(3), 0, 1)))
    run = play(recipe, root).run
    aside = list(root.rglob("*.damaged-1"))
    assert len(aside) == 1, "what was damaged is kept"
    for path in (p for p in finished.root.rglob("*") if p.suffix in (".parquet", ".safetensors")):
        assert (root / path.relative_to(finished.root)).read_bytes() == path.read_bytes()
    assert run.digest(run.stage(0, "train")), "and it verifies"


@pytest.mark.parametrize(
    "name",
    [
        "data/held_out.parquet",
        "iter-00/evaluate/answers.parquet",
        "iter-00/evaluate/metrics.json",
        "iter-00/train/metrics.jsonl",
        "data/summary.json",
    ],
)
def test_a_report_shows_nothing_damaged(name: str, finished: RunDir) -> None:
    path = finished.root / name
    content = path.read_bytes()
    for damaged in damages(content, random.Random(4), 2, 3):
        path.write_bytes(damaged)
        with pytest.raises(CorruptedError, match=f"{path.name} is (corrupted|missing).*recreates"):
            write_report(RunDir(finished.root))
        path.write_bytes(content)


@pytest.mark.parametrize("pattern", ["*.safetensors", "state.json", "metrics.jsonl", "MANIFEST.json"])
def test_the_newest_checkpoint_that_is_whole_is_taken(pattern: str, tmp_path: Path) -> None:
    """50 cuts and 50 flips of each kind of file in the newest checkpoint; the one before it is found each time."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    metrics = tmp_path / "metrics.jsonl"
    checkpoints = Checkpointer(tmp_path, model, optimizer, metrics, SingleProcess())
    weights = {}
    for step in (1, 2):
        model(torch.ones(8)).sum().backward()
        optimizer.step()
        metrics.write_text(f'{{"step": {step}}}\n')
        checkpoints.save(step)
        checkpoints.wait()
        weights[step] = model.weight.detach().clone()
    newest = tmp_path / "step-00000002"
    whole = shutil.copytree(newest, tmp_path / "whole")
    assert checkpoints.load() == 2
    found = 0
    for path, damaged in hundred(sorted(whole.glob(pattern)), seed=5):
        shutil.copytree(whole, newest, dirs_exist_ok=True)
        (newest / path.name).write_bytes(damaged)
        assert checkpoints.load() == 1
        assert torch.equal(model.weight, weights[1]) and metrics.read_text() == '{"step": 1}\n'
        found += 1
    assert found == 100


def test_damaged_parts_are_drawn_again(tmp_path: Path) -> None:
    part = tmp_path / "part-00000.parquet"
    commit_part(part, lambda path: path.write_bytes(bytes(range(256))))
    assert has_part(part)
    for path in (part, part.with_name(part.name + ".xxh3")):
        for _, damaged in hundred([path], seed=6):
            path.write_bytes(damaged)
            assert not has_part(part)
    assert has_part(part)


def test_half_done_work_made_from_other_inputs_is_not_continued(tmp_path: Path) -> None:
    work = sparring.run.manifest.begin_work(tmp_path / ".train.partial", {"data": "a"})
    (work / "step-1").mkdir()
    assert (sparring.run.manifest.begin_work(work, {"data": "a"}) / "step-1").is_dir()
    assert not (sparring.run.manifest.begin_work(work, {"data": "b"}) / "step-1").exists()


def test_control_without_the_check_damage_goes_unseen(
    recipe: Recipe, finished: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flipped bit in a weight is a weight: without the manifest nothing notices."""
    monkeypatch.setattr(sparring.run.manifest, "_check", lambda *_: None)
    (path,) = files(finished, "safetensors")
    content = path.read_bytes()
    damaged = bytearray(content)
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    play(recipe, finished.root)
    assert not list(finished.root.rglob("*.damaged-*"))
    path.write_bytes(content)
