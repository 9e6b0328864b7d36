"""Ranks that are forks of the tests' own process, which has imported everything: an import takes seven seconds, and
what a rank does in a test less than one.

Torchrun's agent, processes, signals and exit codes are as users have them. The interpreters are not, nor the process
that guards them: tests that are about those ask for `as_users_start_them`.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import IO, NoReturn

from accelerate.state import AcceleratorState
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from sparring.stages import worker as worker  # what ranks run


class Fork:
    """A program in a fork of this process. Has what torchrun and sparring ask of `subprocess.Popen`."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str], **_: object) -> None:
        self.args = args
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            run(args, dict(env))

    def poll(self) -> int | None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        began = time.monotonic()
        while (code := self.poll()) is None:
            if timeout is not None and time.monotonic() - began > timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return code


def run(args: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """`python -m MODULE ARGUMENTS`, or `python SCRIPT ARGUMENTS`."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, signal.SIG_DFL)
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        os.environ.clear()
        os.environ.update(env)
        AcceleratorState._reset_state(True)
        subprocess_handler.Popen = Fork  # type: ignore[attr-defined]
        if args[1] == "-m":
            sys.argv = [*args[2:]]
            import_module(args[2]).main()
        else:
            sys.argv = [*args[1:]]
            sys.path.insert(0, str(Path(args[1]).parent))
            runpy.run_path(args[1], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@contextmanager
def forked_process(words: Sequence[str], log: IO[bytes] | None = None) -> Iterator[Fork]:
    """In place of `processes.guarded_process`."""
    assert log is None
    process = Fork(words, os.environ)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.kill(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
