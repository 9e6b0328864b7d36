"""Ctrl-C and SIGTERM: the run commits its current unit of work, then stops. A second signal stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sparring.errors import Interrupted
from sparring.logging import info

SIGNALS = (signal.SIGINT, signal.SIGTERM)

_asked: list[int] = []
_note: list[Path] = []


@contextmanager
def listening() -> Iterator[None]:
    """Within the block, the first signal is a request to stop. Only the main thread can listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _ask) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked.clear()  # the request was for this run, not for what the process does next


def follow(note: Path) -> None:
    """In a rank, which gets no signal: the process that owns the run creates this file to ask for a stop."""
    _note.append(note)


def is_asked() -> bool:
    return bool(_asked) or any(note.exists() for note in _note)


def stop_if_asked() -> None:
    """For places where everything so far is on disk."""
    if is_asked():
        stop()


def stop() -> None:
    raise Interrupted(_asked[0] if _asked else signal.SIGTERM)


def _ask(number: int, _: FrameType | None) -> None:
    if _asked:
        raise Interrupted(number)
    _asked.append(number)
    info("Stopping after the current step, part or stage is committed. Interrupt again to stop at once.")
