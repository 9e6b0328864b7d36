"""From a clean clone to the first report: what a newcomer waits for after `git clone` and `make demo`.

    python benchmarks/first_report.py FOLDER --out benchmarks/results/first_report.json [--only clone | install | demo]

Each part is timed by itself and kept in FOLDER, so that they can be done in turn: the clone of this repository, the
environment with its packages (`make .venv/.installed`, from whatever index and cache pip has), and `make demo`, until
the first report is there and until the last.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

from demo_seeds import cpu_name

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "clone": ["git", "clone", "--quiet", str(ROOT), "clone"],
    "install": ["make", "-C", "clone", ".venv/.installed"],
    "demo": ["make", "-C", "clone", "demo"],
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=PARTS)
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True, parents=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for part, command in PARTS.items():
        kept = options.folder / f"{part}.json"
        if kept.exists() or options.only not in (None, part):
            continue
        before, began, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time(), time.monotonic()
        subprocess.run(command, cwd=options.folder, env=environment, check=True)
        wall, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        found = {"wall_seconds": wall, "cpu_seconds": cpu, "load_at_the_end": os.getloadavg()[0]}
        if part == "demo":
            reports = (options.folder / "clone" / "runs" / "demo").glob("*/report.html")
            written = [path.stat().st_mtime - began for path in reports]
            found |= {"first_report": min(written), "last_report": max(written)}
        kept.write_text(json.dumps(found), encoding="utf-8")
        print(part, found)
    done = {part: options.folder / f"{part}.json" for part in PARTS}
    if all(path.exists() for path in done.values()):
        result = {
            "what": "seconds from a clean clone to the reports of make demo",
            "processor": f"{cpu_name()}, {os.cpu_count()} cores",
            "date": time.strftime("%Y-%m-%d"),
            "torch": version("torch"),
            **{part: json.loads(path.read_text(encoding="utf-8")) for part, path in done.items()},
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
