"""Eight processes want one run directory. One gets it; the others are told who has it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sparring.errors import Refused
from sparring.rundir import RunDir

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
    except Refused as refusal:
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
