"""Child processes that end when sparring ends, for whatever reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

SUPERVISOR = """
import os, signal, subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
def end():
    sys.stdin.read()
    child.terminate()
    try:
        child.wait(10)
    finally:
        os.killpg(0, signal.SIGKILL)
threading.Thread(target=end, daemon=True).start()
os._exit(abs(child.wait()))
"""
"""Runs a program, and kills its process group when sparring closes the pipe or dies."""


@contextmanager
def guarded_process(words: Sequence[str], log: IO[bytes] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """The running program. `log`: where its output goes."""
    process = subprocess.Popen(  # noqa: S603  (the words are the user's own settings, or ours)
        [sys.executable, "-c", SUPERVISOR, *words],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()
