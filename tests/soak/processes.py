"""What processes hold and have started, as Linux says."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def rss_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGESIZE") / 2**20, 1)


class Mallinfo2(ctypes.Structure):
    """What glibc's malloc says of itself (mallinfo(3))."""

    names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in names)


def allocated_mib() -> float:
    """What was asked of malloc and not given back: where memory grows and this does not, it is malloc's own."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    found = mallinfo2()
    return round((found.uordblks + found.hblkhd) / 2**20, 2)


def children(process: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = status.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == process and state != "Z":
                found.append(int(status.parent.name))
    return found


def ranks_below(process: int) -> list[int]:
    """The processes that torchrun started somewhere below `process`."""
    found = []
    for child in children(process):
        with suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")
            if b"sparring.stages.worker" in words and words[1] == b"-m":  # what starts it names it later
                found.append(child)
        found += ranks_below(child)
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")
