"""How often, and for how long, a lock outlives its owner that is killed while it starts programs.

    python benchmarks/lock_after_death.py --out benchmarks/results/lock_after_death.json

Between fork and exec the child has its parent's open files, the lock among them. Why a start of sparring waits a second
for the lock: docs/reliability.md.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from demo_seeds import cpu_name
from filelock import FileLock

BALLAST = 300 * 2**20
"""Bytes of memory, as a process that has imported torch has them: copying their page tables is what takes long."""


def seconds_held(path: Path, source: random.Random) -> float:
    """Seconds from the death of an owner until its lock is free; 0 if it is at once."""
    reader, writer = os.pipe()
    owner = os.fork()
    if owner == 0:
        FileLock(path, timeout=5).acquire()
        os.write(writer, b"x")
        while True:
            subprocess.run(["git", "--version"], capture_output=True, check=False)  # noqa: S607
    os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    time.sleep(source.uniform(0, 0.03))
    os.kill(owner, signal.SIGKILL)
    os.waitpid(owner, 0)
    began, is_held = time.perf_counter(), False
    with path.open("rb+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return (time.perf_counter() - began) * is_held
            except BlockingIOError:
                is_held = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deaths", type=int, default=300)
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    source, ballast = random.Random(0), bytearray(BALLAST)  # noqa: S311
    with tempfile.TemporaryDirectory() as folder:
        held = [seconds_held(Path(folder) / "lock", source) for _ in range(wanted.deaths)]
    result = {
        "deaths": wanted.deaths,
        "lock_held_after": sum(seconds > 0 for seconds in held),
        "longest_ms": round(1000 * max(held), 1),
        "ballast_mib": len(ballast) >> 20,
        "load_average": os.getloadavg(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{cpu_name()}, {os.cpu_count()} CPUs, shared with other work",
    }
    print(json.dumps(result, indent=1))
    if wanted.out:
        wanted.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
