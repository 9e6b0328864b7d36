"""Disks: what a run will need, and what is said when there is not enough or it may not be written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparring.errors import Stopped

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
# what Rust and Arrow say where Python would have set errno
FULL_WORDS = ("No space left", "os error 28", "os error 122", "os error 27", "File too large", "Disk quota exceeded")


@contextmanager
def writing(path: Path, needs: int = 0) -> Iterator[None]:
    """Says which path could not be written, why, and how many bytes are missing; `needs` bytes are asked for first."""
    free = free_bytes(path)
    if free < needs:
        raise Stopped(
            f"{path} needs {size(needs)} and the disk has {size(free)}: {size(needs - free)} are missing. Nothing was "
            "lost; make room, and the same command continues"
        )
    try:
        yield
    except Stopped:
        raise  # said already, by who writes a part of it
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in FULL or any(words in str(error) for words in FULL_WORDS):
            asked = f"it needs {size(needs)}" if needs else "it needs more"
            raise Stopped(
                f"{path} could not be written: the disk is full, or a quota or a limit is reached ({error}). "
                f"{size(free)} were free, {asked}. Nothing that was committed is lost; make room, and the same "
                "command continues"
            ) from error
        if code in FORBIDDEN:
            raise Stopped(
                f"{path} could not be written: {error}. This process runs as user {os.getuid()}; give it the right to "
                "write there, and the same command continues"
            ) from error
        raise


def free_bytes(path: Path) -> int:
    """What an ordinary user may still write where `path` is or will be."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def size(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # pyright: ignore[reportAssignmentType]
    return f"{count:,.1f} GB"
