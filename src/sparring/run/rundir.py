"""The run directory: its paths, the lineage of its contents, and its owner. There is no other state."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from sparring.errors import RunError, RunMismatch, UserError
from sparring.run.manifest import (
    Json,
    Manifest,
    hash_path,
    is_committed,
    make_folder,
    read_manifest,
    remove_leftovers,
    replace_file,
    verify,
)

# A child of a killed process may hold its lock for a moment.
LOCK_SECONDS = 1.0

# Ranks may outlive the process that started them by a few seconds; a new start waits for them.
RANKS_LOCK = ".ranks.lock"
RANKS_SECONDS = 30.0

STAGES = ("generate", "score", "train", "evaluate")
JUDGED = "judged"
BENCHMARKS = "benchmarks"
"""The folder of an iteration that holds one stage per benchmark."""


class RunDir:
    """The paths below a run directory."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).resolve()
        self.recipe = self.root / "recipe.yaml"
        self.env = self.root / "env.json"
        self.data = self.root / "data"
        self.rows = self.root / "rows"  # that the caller of `play` held in memory
        self.start = self.root / "start"
        self.report = self.root / "report.html"
        self.ranks = self.root / ".ranks"  # notes between the ranks of a stage and the process that started them
        self._owner = self.root / ".owner.json"
        self._verified: dict[Path, Manifest] = {}
        self._outside: dict[Path, str] = {}

    @property
    def has_begun(self) -> bool:
        """Whether anything exists that depends on the settings."""
        return any(self.root.glob("data*")) or self.start.exists() or any(self.root.glob("iter-*"))

    def iteration(self, index: int) -> Path:
        return self.root / f"iter-{index:02d}"

    def stage(self, index: int, stage: str) -> Path:
        return self.iteration(index) / stage

    @staticmethod
    def work(stage: Path) -> Path:
        """Where a stage keeps partial results: parts, checkpoints."""
        return stage.with_name(f".{stage.name}.partial")

    def model(self, index: int) -> Path:
        """The policy that iteration `index` trained: the opponent of the next one."""
        return self.stage(index, "train") / "model"

    def digest(self, path: Path) -> str:
        """The verified content digest of a committed directory, a folder inside one, or a path outside the run.

        Reads every path once per process: 13 GiB of weights are hashed at disk speed.
        """
        if not path.is_relative_to(self.root):
            if path not in self._outside:
                self._outside[path] = hash_path(path)
            return self._outside[path]
        for committed in (path, *path.parents):
            if is_committed(committed):
                inside = path.relative_to(committed).as_posix()
                return self.verify(committed).digest("" if inside == "." else inside + "/")
            if committed == self.root:
                break
        raise RunError(f"{path} does not exist yet")

    def verify(self, committed: Path) -> Manifest:
        """The manifest of a committed directory; its files are verified once per process."""
        if committed not in self._verified:
            self._verified[committed] = verify(committed)
        return self._verified[committed]

    def set_aside(self, folder: Path) -> Path:
        """Renames a corrupted folder, so that its stage can run again; deletes nothing."""
        taken = len(list(folder.parent.glob(f"{folder.name}.damaged-*")))
        return folder.rename(folder.with_name(f"{folder.name}.damaged-{taken + 1}"))

    def input_digests(self, *paths: Path) -> dict[str, str]:
        """Verified digests of a stage's inputs: {path below the run directory, or absolute: digest}."""
        return {
            (path.relative_to(self.root) if path.is_relative_to(self.root) else path).as_posix(): self.digest(path)
            for path in paths
        }

    def check_lineage(self, path: Path) -> None:
        """Refuses a committed directory whose inputs have changed since."""
        for name, digest in read_manifest(path).input_digests.items():
            source = self.root / name  # an absolute path stays absolute
            if not source.is_relative_to(self.root):
                if source.exists() and self.digest(source) != digest:
                    raise RunMismatch(
                        f"{source} has changed since {self.root} was started from it. Use another run directory, or "
                        "restore the old file."
                    )
            elif self.digest(source) != digest:
                raise RunError(
                    f"{path} was made from another {name} than the current one. Delete {path} and everything after it, "
                    "and run the same command again."
                )

    @contextmanager
    def own(self) -> Iterator[None]:
        """Locks the run directory. The kernel releases the lock when the process ends, for whatever reason."""
        lock = FileLock(self.root / ".lock", timeout=LOCK_SECONDS, mode=0o600)
        try:
            make_folder(self.root, 0o700)
            lock.acquire()
        except Timeout as error:
            owner = self._wait_for_owner()
            held = f"process {owner['pid']} on {owner['host']} since {owner['since']}" if owner else "another process"
            raise UserError(f"{self.root} is in use by {held}. Wait for it, or stop it.") from error
        except OSError as error:
            raise UserError(
                f"{self.root} cannot be used as a run directory: {error}. Choose a folder where user {os.getuid()} may "
                "write, on a disk with free space."
            ) from error
        try:
            if (self.root / RANKS_LOCK).exists():
                with self.ranks_lock(RANKS_SECONDS):
                    pass
        except Timeout as error:
            lock.release()
            raise UserError(
                f"Processes of an earlier start are still running in {self.root}. Wait for them, or stop them."
            ) from error
        try:
            me = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            replace_file(self._owner, json.dumps(me))
            remove_leftovers(self.root.rglob(".*.tmp-*"))
            yield
        except OSError as error:
            if not self.has_begun:
                raise
            raise RunError(f"{error}. Everything committed is intact; the same command continues.") from error
        finally:
            self._owner.unlink(missing_ok=True)
            lock.release()

    def ranks_lock(self, seconds: float) -> FileLock:
        """Held by the main rank of a stage, which may briefly outlive the process that owns the run."""
        return FileLock(self.root / RANKS_LOCK, timeout=seconds, mode=0o600)

    def owner(self) -> Json | None:
        """The live process that holds the run directory, as far as this host can tell."""
        try:
            owner = json.loads(self._owner.read_text(encoding="utf-8"))
            if owner["host"] == platform.node():
                os.kill(owner["pid"], 0)
            return owner
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _wait_for_owner(self) -> Json | None:
        """The owner writes its note shortly after it takes the lock."""
        for _ in range(20):
            if owner := self.owner():
                return owner
            time.sleep(0.05)
        return None
