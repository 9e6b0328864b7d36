"""Disk space: checked before large writes, and reported when a write fails."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparring.errors import RunError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
# what Rust and Arrow say where Python sets errno
FULL_MESSAGES = ("No space left", "os error 28", "os error 122", "os error 27", "File too large", "Disk quota exceeded")


@contextmanager
def writing(path: Path, required_bytes: int = 0) -> Iterator[None]:
    """Reports which path could not be written, why, and how many bytes are missing.

    `required_bytes` are checked first.
    """
    free = free_bytes(path)
    if free < required_bytes:
        raise RunError(
            f"{path} needs {format_bytes(required_bytes)}, and {format_bytes(free)} are free. Nothing was lost: free "
            f"{format_bytes(required_bytes - free)}, and the same command continues."
        )
    try:
        yield
    except RunError:
        raise  # reported already, where a part of it is written
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in FULL or any(message in str(error) for message in FULL_MESSAGES):
            needed = format_bytes(required_bytes) if required_bytes else "more"
            raise RunError(
                f"{path} could not be written: the disk is full, or a quota or limit is reached ({error}). "
                f"{format_bytes(free)} were free; it needs {needed}. Everything committed is intact: free some space, "
                "and the same command continues."
            ) from error
        if code in FORBIDDEN:
            raise RunError(
                f"{path} could not be written: {error}. Allow user {os.getuid()} to write there, and the same command "
                "continues."
            ) from error
        raise


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged user may still write where `path` is or will be."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    return shutil.disk_usage(there).free


def format_bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"
