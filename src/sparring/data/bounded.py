"""Strangers' programs run in a process of their own, with bounded time and memory: chat templates and tokenizers.

transformers' sandbox keeps a template from files and from Python's insides, but not from `{% for i in range(99999) %}`
inside another one, from `'a' * 10**10`, or from `9**9**9`, which no exception can interrupt. A tokenizer.json holds
regular expressions, which may take minutes for a page of text: Oniguruma bounds each match, and not all of them. The
kernel can bound both. What they give comes back through a pipe, as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, cast

SECONDS = 10
"""Of CPU time, for one call."""
MEMORY = 2**30
"""Bytes beyond those of this process."""
LONGEST = 2**26
"""Characters, or tokens, that a call may give."""

Functions = Mapping[str, Callable[..., Any]]


class CallFailed(ValueError):
    """What a program says to these arguments."""


class LimitExceeded(Exception):
    """The program needed more than it is given, and was ended."""

    def __init__(self) -> None:
        super().__init__(f"used up {SECONDS} seconds or {MEMORY >> 20} MiB")


class BoundedProcess:
    """A child that calls functions by name. Forked, since it needs what is imported here and nothing else."""

    def __init__(self, functions: Functions) -> None:
        ours, theirs = cast(tuple[Connection, Connection], Pipe())
        sys.stdout.flush()
        sys.stderr.flush()
        self.child = os.fork()
        if self.child == 0:
            _serve(theirs, functions)
        theirs.close()
        self.pipe = ours
        self.close = weakref.finalize(self, _end, os.getpid(), self.child, ours)

    def __call__(self, name: str, *arguments: object) -> Any:
        """What the function gives. Raises `CallFailed` for these arguments, `LimitExceeded` when the child had to be ended."""
        try:
            self.pipe.send_bytes(json.dumps([name, arguments]).encode())
            answer = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self.close()
            raise LimitExceeded from error
        if "refuses" in answer:
            raise CallFailed(answer["refuses"])
        return answer["gives"]


def _end(parent: int, child: int, pipe: Connection) -> None:
    """If we die instead, the child finds the end of the pipe, and ends by itself."""
    pipe.close()
    if os.getpid() != parent:
        return  # a later fork of ours, which has a copy of everything
    with suppress(ChildProcessError, ProcessLookupError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(pipe: Connection, functions: Functions) -> None:
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # asked to stop, the parent finishes its unit first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library's panic is said by us, in one line
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads were not forked
        os.closerange(3, pipe.fileno())  # the lock of the run, among others
        os.closerange(pipe.fileno() + 1, 2**16)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_AS, _address_space() + MEMORY)
        while True:
            name, arguments = json.loads(pipe.recv_bytes())
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS + 1)
            pipe.send_bytes(json.dumps(_answer(functions[name], arguments)).encode())
    except (EOFError, OSError):
        pass  # nobody waits for an answer
    finally:
        os._exit(0)


def _answer(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    try:
        gives = function(*arguments)
    except MemoryError:
        return {"refuses": f"it wants more than {MEMORY >> 20} MiB"}
    except BaseException as error:  # a panic in Rust is no Exception
        return {"refuses": str(error)[:500] or type(error).__name__}
    if len(gives) > LONGEST:
        return {"refuses": f"it gives {len(gives):,} characters or tokens; {LONGEST:,} are allowed"}
    return {"gives": gives}


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    with suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space() -> int:
    """Bytes of virtual memory that this process has by now."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[0]) * resource.getpagesize() if status.is_file() else 2**40
