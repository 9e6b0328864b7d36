"""Power loss: what was not synced may be gone, and a run resumes from what is left.

A kill leaves the page cache, so no kill shows that files and folders are synced, and in an order that helps. Here a run
is recorded, with every change of a name or of bytes and every sync; then the power fails after each of these.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from unsynced import Disk, Operation, Promised, Synced, Tree, put, record

import sparring.loop
import sparring.stages.generate.stage
from sparring.errors import RunError, UserError
from sparring.loop import play
from sparring.recipe.schema import Recipe
from sparring.run.manifest import copy_committed, has_part, is_committed, read_sealed, verify
from sparring.run.mirror import Mirror
from sparring.run.rundir import RunDir
from sparring.run.session import load_sealed_recipe
from sparring.stages.train.checkpoint import _newest

pytestmark = pytest.mark.slow

Log = list[Operation]
PLAYED_ON = 6


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparring.stages.generate.stage, "PART_PROMPTS", 8)
        yield


@pytest.fixture(scope="module")
def recipe(make_recipe: Callable[..., Recipe]) -> Recipe:
    return make_recipe(
        "spin",
        iterations=1,
        data={"held_out": 8, "limit": 40},
        generate={"max_new_tokens": 4, "batch_size": 8},
        train={"epochs": 1, "batch_size": 4, "checkpoint_minutes": 0},
    )


@pytest.fixture(scope="module")
def recorded(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Log]:
    """A whole run, and all that it did to the disk."""
    top = tmp_path_factory.mktemp("recorded")
    log = record(top, lambda: play(recipe, top / "run"))
    return RunDir(top / "run"), log


def after_power_loss(log: Log, seed: int = 0) -> Iterator[tuple[int, Tree, int]]:
    """Every different state that is left when the power fails after some operation, and how many files are lost.

    Lost is what a commit had promised, and what was not removed since.
    """
    disk, source, seen = Disk(), random.Random(seed), set[int]()
    for number, operation in enumerate(log):
        disk.do(operation)
        must = disk.must_be_there()
        for tree, files in disk.crashes(source):
            lost = sum(files.get(file) != content for file, content in must.items())
            mark = hash((frozenset(tree.items()), lost))
            if mark not in seen:
                seen.add(mark)
                yield number, tree, lost


def faults(run: RunDir, truth: Tree, lost: int) -> Iterator[str]:
    """What is wrong with a run directory after a power loss, as the code finds it that would resume from there."""
    if lost:
        yield f"{lost} files were committed and are gone"
    top = run.root.parent
    for folder in (p for p in run.root.rglob("*") if is_committed(p) and "/." not in str(p.relative_to(top))):
        try:
            names = [*verify(folder).files]
        except RunError as problem:
            yield f"corrupted under its final name: {problem}"
            continue
        for name in names:
            if (folder / name).read_bytes() != truth[str((folder / name).relative_to(top))]:
                yield f"{folder / name} is another one, and was taken"
    for part in run.root.rglob("part-*.parquet"):
        if has_part(part) and part.read_bytes() != truth[str(part.relative_to(top))]:
            yield f"{part} is another one, and was taken"
    work = run.work(run.stage(0, "train"))
    whole = [name for name in truth if name.endswith("MANIFEST.json") and is_whole(top, name, truth)]
    expected = max((Path(name).parent.name for name in whole if "/step-" in name), default="")
    if work.is_dir() and (found := _newest(work, work / "metrics.jsonl")) != expected:
        yield f"resumes from '{found}' where '{expected}' is whole"
    try:
        if run.recipe.is_file() or run.has_begun:
            load_sealed_recipe(run.recipe)
        if run.env.is_file():
            read_sealed(run.env)
    except (RunError, UserError) as problem:
        yield f"the run cannot resume: {problem}"


def is_whole(top: Path, manifest: str, truth: Tree) -> bool:
    folder = str(Path(manifest).parent)
    return all((top / n).is_file() and (top / n).read_bytes() == truth[n] for n in truth if n.startswith(f"{folder}/"))


def truth_of(log: Log) -> Tree:
    """What every file held when its commit was done."""
    disk, truth = Disk(), Tree()
    for operation in log:
        disk.do(operation)
        if isinstance(operation, Promised):
            truth |= disk.promised_by_name()
    return truth


def all_faults(log: Log, folder: Path, truth: Tree) -> Iterator[tuple[int, list[str]]]:
    folder.mkdir()
    for number, tree, lost in after_power_loss(log):
        yield number, list(faults(RunDir(put(tree, folder) / "run"), truth, lost))


def test_whatever_a_power_loss_leaves_is_old_or_new(recorded: tuple[RunDir, Log], tmp_path: Path) -> None:
    _, log = recorded
    found = list(all_faults(log, tmp_path / "left", truth_of(log)))
    print(f"{len(log)} operations, {len(found)} states")
    assert len(log) > 200 and len(found) > 1000
    assert not [(number, said) for number, said in found if said]


@pytest.mark.parametrize("what", ["folders", "files"])
def test_the_replay_sees_what_is_not_synced(what: str, recorded: tuple[RunDir, Log], tmp_path: Path) -> None:
    _, log = recorded
    unsynced = [o for o in log if not (isinstance(o, Synced) and (o.node > 0) == (what == "files"))]
    found = set[str]()
    for _, said in all_faults(unsynced, tmp_path / "left", truth_of(log)):
        found |= {kind for kind in ("are gone", "corrupted under its final name") for line in said if kind in line}
        if len(found) == 2:
            return
    pytest.fail(f"found was {found}")


def test_the_same_command_resumes(recipe: Recipe, recorded: tuple[RunDir, Log], tmp_path: Path) -> None:
    straight, log = recorded
    states = list(after_power_loss(log))
    for number, tree, _ in random.Random(1).sample(states, PLAYED_ON):
        (tmp_path / str(number)).mkdir()
        run = play(recipe, put(tree, tmp_path / str(number)) / "run").run
        assert weights_and_rows(run) == weights_and_rows(straight), f"after operation {number}"


def weights_and_rows(run: RunDir) -> dict[str, bytes]:
    kept = (p for p in run.root.rglob("*") if p.suffix in (".parquet", ".safetensors"))
    return {str(p.relative_to(run.root)): p.read_bytes() for p in kept}


@pytest.mark.parametrize("way", ["copy", "mirror"])
def test_copies_of_what_is_committed(way: str, recorded: tuple[RunDir, Log], tmp_path: Path) -> None:
    """A copied folder that has its final name is whole; when the copy is said to be made, it stays."""
    run, _ = recorded
    (tmp_path / "top").mkdir()
    other = RunDir(tmp_path / "top" / "run")
    if way == "copy":
        log = record(tmp_path / "top", lambda: copy_committed(run.stage(0, "train"), other.stage(0, "train")))
    else:
        mirror = Mirror(f"file://{tmp_path / 'mirror'}")
        mirror.send(run, run.stage(0, "train"))
        log = record(tmp_path / "top", lambda: mirror.fetch(other))
    num_whole = 0
    (tmp_path / "left").mkdir()
    for number, tree, _ in after_power_loss(log):
        copy = RunDir(put(tree, tmp_path / "left") / "run").stage(0, "train")
        if copy.exists():
            assert verify(copy).digest() == verify(run.stage(0, "train")).digest()
            num_whole += 1
        assert copy.exists() or number < len(log) - 1
    assert num_whole
