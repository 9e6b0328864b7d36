"""Runs untrusted programs in a child process with CPU and memory limits: chat templates and tokenizers.

transformers' sandbox keeps a template away from files and Python's internals. It does not stop nested
`{% for i in range(99999) %}` loops, `'a' * 10**10`, or `9**9**9`, which no exception can interrupt. A tokenizer.json
contains regular expressions that may take minutes on a page of text. The kernel limits both. Results come back through
a pipe as JSON.
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

CPU_SECONDS = 10
"""CPU time of one call."""
EXTRA_MEMORY_BYTES = 2**30
"""Address space of the child beyond that of its parent."""
MAX_RESULT_LENGTH = 2**26
"""Characters, or tokens, of one result."""

Functions = Mapping[str, Callable[..., Any]]


class CallFailed(ValueError):
    """The error that a call raised for these arguments."""


class LimitExceeded(Exception):
    """The call exceeded a limit, and its process was killed."""

    def __init__(self) -> None:
        super().__init__(f"exceeded the limit of {CPU_SECONDS} CPU seconds or {EXTRA_MEMORY_BYTES >> 20} MiB")


class BoundedProcess:
    """A child process that calls functions by name. It is forked, so it needs no imports of its own."""

    def __init__(self, functions: Functions) -> None:
        parent_pipe, child_pipe = cast(tuple[Connection, Connection], Pipe())
        sys.stdout.flush()
        sys.stderr.flush()
        self.child = os.fork()
        if self.child == 0:
            _serve(child_pipe, functions)
        child_pipe.close()
        self.pipe = parent_pipe
        self.close = weakref.finalize(self, _kill, os.getpid(), self.child, parent_pipe)

    def __call__(self, name: str, *arguments: object) -> Any:
        """Returns the function's result. Raises `CallFailed` if it raised, `LimitExceeded` if the child died."""
        try:
            self.pipe.send_bytes(json.dumps([name, arguments]).encode())
            reply = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self.close()
            raise LimitExceeded from error
        if "error" in reply:
            raise CallFailed(reply["error"])
        return reply["result"]


def _kill(parent: int, child: int, pipe: Connection) -> None:
    """Closes the pipe and kills the child. If the parent dies first, the child reads the end of the pipe and exits."""
    pipe.close()
    if os.getpid() != parent:
        return  # a later fork of the parent, which inherited this finalizer
    with suppress(ChildProcessError, ProcessLookupError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(pipe: Connection, functions: Functions) -> None:
    """The child's loop. Never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # when interrupted, the parent finishes its unit of work first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the parent reports a library's panic in one line
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
        os.closerange(3, pipe.fileno())  # the run's lock, among others
        os.closerange(pipe.fileno() + 1, 2**16)
        _set_limit(resource.RLIMIT_CORE, 0)
        _set_limit(resource.RLIMIT_AS, _address_space() + EXTRA_MEMORY_BYTES)
        while True:
            name, arguments = json.loads(pipe.recv_bytes())
            used = resource.getrusage(resource.RUSAGE_SELF)
            _set_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + CPU_SECONDS + 1)
            pipe.send_bytes(json.dumps(_call(functions[name], arguments)).encode())
    except (EOFError, OSError):
        pass  # the parent is gone
    finally:
        os._exit(0)


def _call(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    try:
        result = function(*arguments)
    except MemoryError:
        return {"error": f"it needs more than {EXTRA_MEMORY_BYTES >> 20} MiB"}
    except BaseException as error:  # a panic in Rust is not an Exception
        return {"error": str(error)[:500] or type(error).__name__}
    if len(result) > MAX_RESULT_LENGTH:
        return {"error": f"its result has {len(result):,} characters or tokens; the limit is {MAX_RESULT_LENGTH:,}"}
    return {"result": result}


def _set_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    with suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space() -> int:
    """Bytes of virtual memory that this process has now."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[0]) * resource.getpagesize() if status.is_file() else 2**40
