"""Full disks, forbidden folders: which path, what is missing, nothing lost, and the same command continues."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

import sparring.stages.generate.stage
from sparring.cli import main
from sparring.errors import RunError
from sparring.loop import play
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe
from sparring.run.disk import writing
from sparring.run.manifest import is_committed, verify

pytestmark = pytest.mark.slow

GROWS_BY_BYTES = 80 * 1024

# A disk of its own, in a namespace of its own. It is full; it grows; the same command runs again; until it ends.
DRIVER = """
import gc, json, os, subprocess, sys
from pathlib import Path
import sparring.cli, sparring.commands.forecast, sparring.run.disk, sparring.stages.generate.stage, sparring.report
from sparring.run.manifest import is_committed, verify

gc.collect()
gc.freeze()
recipe, disk, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
sparring.stages.generate.stage.PART_PROMPTS = 20
# curves take longest and write nothing of their own
sparring.report.draw_held_out = sparring.report.draw_training = lambda results: []
outcomes, size = [], step
while True:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
    child = os.fork()
    if child == 0:
        said = os.open(disk.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 2)
        if len(outcomes) % 4:  # else the forecast, and what is asked for beforehand, come first
            sparring.commands.forecast.check_disk = lambda *_: None
            sparring.run.disk.free_bytes = lambda path: 10**15
        sys.argv = ["sparring", "run", recipe, str(disk / "run")]
        sparring.cli.main()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    run = disk / "run"
    whole = sorted(str(p.relative_to(run)) for p in run.rglob("*") if is_committed(p))
    for folder in whole:
        verify(run / folder)
    left = [p.name for p in run.rglob("*.tmp-*")]
    said = (disk.parent / "said").read_text()
    outcomes.append({"size": size, "code": code, "said": said, "whole": whole, "left": left})
    if code == 0 or len(outcomes) > 200:
        break
    size += step
kept = [p for p in run.rglob("*") if p.suffix in (".parquet", ".safetensors")]
content = {str(p.relative_to(run)): p.read_bytes().hex() for p in kept}
print(json.dumps({"outcomes": outcomes, "content": content}))
"""


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    made = make_recipe("spin", iterations=1, generate={"max_new_tokens": 6}, train={"checkpoint_minutes": 0}, threads=1)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    return tmp_path / "recipe.yaml"


def may_mount() -> bool:
    command = ["unshare", "-rm", "bash", "-c", "mkdir -p /tmp/.may && mount -t tmpfs none /tmp/.may"]
    return shutil.which("unshare") is not None and subprocess.run(command, check=False).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="no disk of one's own may be mounted here")
def test_a_disk_that_is_full_at_every_write(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "driver.py").write_text(DRIVER)
    mount = (
        f"mount -t tmpfs -o size=8k none {disk} && exec {sys.executable} {tmp_path / 'driver.py'} {recipe} {disk} 40960"
    )
    result = subprocess.run(["unshare", "-rm", "bash", "-c", mount], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    outcomes = found["outcomes"]
    print(f"{len(outcomes) - 1} times full")
    assert len(outcomes) > 6 and outcomes[-1]["code"] == 0
    before: set[str] = set()
    full = 0
    for outcome in outcomes[:-1]:
        said = outcome["said"]
        assert outcome["code"] in (1, 2) and "Traceback" not in said, said
        assert str(disk) in said, "the path"
        assert re.search(r"are free|were free", said), said
        full += "could not be written: the disk is full" in said
        assert before <= set(outcome["whole"]), "nothing that was good is lost"
        before = set(outcome["whole"])
        assert not outcome["left"], "what was half written is gone, and its room is free"
    assert full > 3
    monkeypatch.setattr(sparring.stages.generate.stage, "PART_PROMPTS", 20)
    straight = play(recipe, tmp_path / "straight").run.root
    expected = {
        str(p.relative_to(straight)): p.read_bytes().hex()
        for p in straight.rglob("*")
        if p.suffix in (".parquet", ".safetensors")
    }
    assert found["content"] == expected, "and it ends as if there had been room"


class Quota:
    """Syncs that are refused from the n-th on, as a file system does that counts bytes when it gives them a place."""

    def __init__(self, number: int) -> None:
        self.left = number
        self.sync = os.fsync

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        self.sync(descriptor)


def test_a_quota_that_is_reached_loses_nothing(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = play(recipe, tmp_path / "straight").run.root
    times = 0
    while True:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Quota(7 + 5 * times))
            try:
                play(recipe, tmp_path / "run")
                break
            except RunError as stop:
                assert str(tmp_path / "run") in str(stop) and "a quota or limit is reached" in str(stop)
        times += 1
        for folder in (p for p in (tmp_path / "run").rglob("*") if is_committed(p)):
            verify(folder)
        assert not list((tmp_path / "run").rglob(".*.tmp-*"))
    assert times > 3
    kept = {p.relative_to(straight) for p in straight.rglob("*") if p.suffix in (".parquet", ".safetensors")}
    assert all((straight / p).read_bytes() == (tmp_path / "run" / p).read_bytes() for p in kept)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
        OSError("Error writing bytes to file. Detail: [errno 122] Disk quota exceeded"),
    ],
)
def test_a_quota_in_every_library_s_words(error: Exception, tmp_path: Path) -> None:
    full = pytest.raises(RunError, match=r"part could not be written: the disk is full, or a quota")
    with full, writing(tmp_path / "whole"), writing(tmp_path / "part"):
        raise error
    with pytest.raises(ValueError, match="something else"), writing(tmp_path / "here"):
        raise ValueError("something else")


NOBODY = 65534


def as_nobody(said: Path, *arguments: str | Path) -> tuple[int, str]:
    """The command line in a child process as a user without rights; its exit code and what it said."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w")  # pytest's own may lead elsewhere
        if os.getuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        sys.argv = ["sparring", *map(str, arguments)]
        try:
            main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(int(end.code or 0))
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said.read_text()


def test_folders_that_may_not_be_written(recipe: Path, tiny: Path, tmp_path: Path) -> None:
    """In a folder of its own: pytest's are for their owner only."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        shutil.copytree(tiny, home / "tiny")
        shutil.copy(recipe, home / "recipe.yaml")
        for path in (home, *home.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        overrides = (f"model={home / 'tiny/model'}", f"data.train={home / 'tiny/rows.jsonl'}")
        task = (home / "recipe.yaml", home / "run", *overrides)
        play(home / "recipe.yaml", tmp_path / "warm", overrides)  # what is imported late may lie where nobody reads
        home.chmod(0o555)
        if os.getuid() == 0:
            code, said = as_nobody(tmp_path / "said", "run", *task)
            assert code == 2, said
            assert f"{home / 'run'} cannot be used as a run directory" in said and "user 65534" in said, said
        home.chmod(0o755)
        run = play(home / "recipe.yaml", home / "run", overrides).run
        stages = sorted(p.parent for p in run.root.rglob("MANIFEST.json"))
        shutil.rmtree(run.stage(0, "evaluate"))
        if os.getuid() == 0:
            for path in (run.root, *run.root.rglob("*")):
                os.chown(path, NOBODY, NOBODY)
        for folder in (run.iteration(0), run.root):
            folder.chmod(0o500)
            code, said = as_nobody(tmp_path / "said", "run", *task)
            assert code in (1, 2) and "Traceback" not in said, said
            assert str(folder) in said and "Permission denied" in said, said
            folder.chmod(0o700)
        code, said = as_nobody(tmp_path / "said", "run", *task)
        assert code == 0, said
        assert sorted(p.parent for p in run.root.rglob("MANIFEST.json")) == stages
