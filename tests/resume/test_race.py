"""Eight processes want one run directory. One gets it; the others are told who has it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sparring.errors import UserError
from sparring.run.rundir import RunDir

pytestmark = pytest.mark.slow

RACERS = 8
ROUNDS = int(os.environ.get("SPARRING_RACES", "4"))


def race(root: Path, log: Path, gate: Path) -> None:
    """One racer: what it got goes to its own file."""
    while not gate.exists():
        pass
    try:
        with RunDir(root).own():
            began = time.monotonic()
            while len(list(log.parent.glob("racer-*"))) < RACERS - 1 and time.monotonic() < began + 60:
                time.sleep(0.02)  # until every other one has been told
            log.write_text(f"owner {began} {time.monotonic()}")
    except UserError as refusal:
        log.write_text(f"refused {refusal}")


@pytest.mark.parametrize("number", range(ROUNDS))
def test_never_two_owners(number: int, tmp_path: Path) -> None:
    gate, root = tmp_path / "gate", tmp_path / "run"
    children = []
    for racer in range(RACERS):
        child = os.fork()
        if child == 0:
            try:
                race(root, tmp_path / f"racer-{racer}", gate)
            finally:
                os._exit(0)
        children.append(child)
    time.sleep(0.05)
    gate.touch()
    for child in children:
        os.waitpid(child, 0)
    found = [(tmp_path / f"racer-{racer}").read_text() for racer in range(RACERS)]
    owners = [(child, text) for child, text in zip(children, found, strict=True) if text.startswith("owner")]
    assert len(owners) == 1, found
    for text in found:
        assert text.startswith("owner") or f"in use by process {owners[0][0]} on " in text, text
    assert not (root / ".owner.json").exists()


def die_while_starting_another(root: Path) -> None:
    """What a kill between fork and exec leaves: a child that has the lock for a moment longer than its owner."""
    owner = os.fork()
    if owner == 0:
        try:
            with RunDir(root).own():
                links = [fd for fd in Path("/proc/self/fd").iterdir() if fd.exists()]  # not that of the listing itself
                (lock,) = [int(fd.name) for fd in links if fd.readlink().name == ".lock"]
                subprocess.Popen(["sleep", "0.4"], pass_fds=[lock])
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(owner, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc here")
def test_a_lock_that_outlives_its_owner_for_a_moment_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    die_while_starting_another(tmp_path / "run")
    with RunDir(tmp_path / "run").own():
        pass
    monkeypatch.setattr("sparring.run.rundir.LOCK_SECONDS", 0)  # the control
    die_while_starting_another(tmp_path / "run")
    with pytest.raises(UserError, match="is in use by another process"), RunDir(tmp_path / "run").own():
        pass
