"""Chat templates run in a process of their own, with bounded time and memory: a template is a stranger's program.

transformers' sandbox keeps it from files and from Python's insides, but not from `{% for i in range(99999) %}` inside
another one, from `'a' * 10**10`, or from `9**9**9`, which no exception can interrupt. The kernel can. Rendered texts
come back through a pipe, as JSON.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, cast

import jinja2

from sparring.errors import Refused

SECONDS = 10
"""Of CPU time, for one conversation."""
MEMORY = 2**30
"""Bytes beyond those of this process."""
LONGEST = 2**26
"""Bytes of a rendered conversation."""

Turns = Sequence[Mapping[str, Any]]
Render = Callable[[Any, bool], str]


class TemplateRefuses(ValueError):
    """What the template, or the sandbox, says to a conversation."""


class TemplateProcess:
    """A child that renders: messages in, text out. Forked, since it needs what is imported here and nothing else."""

    def __init__(self, render: Render) -> None:
        ours, theirs = cast(tuple[Connection, Connection], Pipe())
        sys.stdout.flush()
        sys.stderr.flush()
        self.child = os.fork()
        if self.child == 0:
            _serve(theirs, render)
        theirs.close()
        self.pipe = ours
        self.close = weakref.finalize(self, _end, os.getpid(), self.child, ours)

    def __call__(self, messages: Turns, add_generation_prompt: bool) -> str:
        """The rendered text. Raises `TemplateRefuses` for these messages, `Refused` for the template as a whole."""
        try:
            self.pipe.send_bytes(json.dumps([list(map(dict, messages)), add_generation_prompt]).encode())
            answer = json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError) as error:
            self.close()
            raise Refused(
                f"data.template: the chat template used up {SECONDS} seconds or {MEMORY >> 20} MiB on one conversation "
                "and was ended. Do not trust the folder that it came from; give data.template one of your own"
            ) from error
        if "refuses" in answer:
            raise TemplateRefuses(answer["refuses"])
        return answer["text"]


def _end(parent: int, child: int, pipe: Connection) -> None:
    """If we die instead, the child finds the end of the pipe, and ends by itself."""
    pipe.close()
    if os.getpid() != parent:
        return  # a later fork of ours, which has a copy of everything
    with suppress(ChildProcessError, ProcessLookupError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(pipe: Connection, render: Render) -> None:
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # asked to stop, the parent finishes its unit first
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        os.closerange(3, pipe.fileno())  # the lock of the run, among others
        os.closerange(pipe.fileno() + 1, 2**16)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_AS, _address_space() + MEMORY)
        while True:
            messages, add_generation_prompt = json.loads(pipe.recv_bytes())
            used = resource.getrusage(resource.RUSAGE_SELF)
            _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS + 1)
            pipe.send_bytes(json.dumps(_answer(render, messages, add_generation_prompt)).encode())
    except (EOFError, OSError):
        pass  # nobody waits for an answer
    finally:
        os._exit(0)


def _answer(render: Render, messages: Turns, add_generation_prompt: bool) -> dict[str, Any]:
    try:
        text = render(messages, add_generation_prompt)
    except MemoryError:
        return {"refuses": f"it wants more than {MEMORY >> 20} MiB"}
    except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        return {"refuses": str(error)[:500]}
    if len(text) > LONGEST:
        return {"refuses": f"it writes {len(text):,} characters; {LONGEST:,} are allowed"}
    return {"text": text}


def _limit(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    with suppress(ValueError, OSError):  # not every system has every limit
        resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _address_space() -> int:
    """Bytes of virtual memory that this process has by now."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[0]) * resource.getpagesize() if status.is_file() else 2**40
