"""A file system that keeps what was synced, and of the rest what it likes: what POSIX promises, and no more.

Bytes are kept once their file was synced, a name once its folder was. Every other change of a name may be kept or lost,
each for itself and in any order; bytes that were not synced may be there, gone, cut or zero.
"""

from __future__ import annotations

import os
import random
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import sparring.run.manifest

TOP = 0
"""The folder that was there before. Files are numbered 1, 2, ..., folders -1, -2, ..., and no number is used twice."""

Names = dict[int, dict[str, int]]
"""What the names in each folder lead to."""
Tree = dict[str, bytes | None]
"""Path -> bytes; None for a folder."""


@dataclass(frozen=True)
class Changed:
    """Names that come and go at once; a rename is one change. Folder, name, what it leads to now."""

    names: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True)
class Written:
    file: int
    content: bytes


@dataclass(frozen=True)
class Synced:
    node: int


@dataclass(frozen=True)
class Promised:
    """A commit has said that it is done: these may not be lost any more, until they are removed."""

    files: tuple[int, ...]


Operation = Changed | Written | Synced | Promised


def record(top: Path, act: Callable[[], object]) -> list[Operation]:
    """What `act` does below `top`, in its order: found by looking at the folder whenever a name or a sync comes."""
    recorder = Recorder(top)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "link", "symlink"):
            patch.setattr(os, name, recorder.around(getattr(os, name)))
        patch.setattr(os, "fsync", recorder.fsync)
        patch.setattr(sparring.run.manifest, "failpoint", recorder.failpoint)
        act()
        recorder.look()
    return recorder.log


@dataclass
class Recorder:
    top: Path
    log: list[Operation] = field(default_factory=list)
    names: Names = field(default_factory=lambda: {TOP: {}})
    content: dict[int, bytes] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)  # of the inodes that are there
    made: int = 0
    _fsync: Callable[[int], None] = os.fsync
    _lock: threading.RLock = field(default_factory=threading.RLock)  # checkpoints are written in a thread

    def look(self) -> None:
        """Logs what has changed since the last look: names, then bytes."""
        names: Names = {}
        content: dict[int, bytes] = {}
        numbers = {self.top.stat().st_ino: TOP}

        def visit(folder: Path, number: int) -> None:
            names[number] = {}
            for entry in os.scandir(folder):
                status = entry.stat(follow_symlinks=False)
                is_folder, inode = stat.S_ISDIR(status.st_mode), status.st_ino
                if inode not in self.numbers and inode not in numbers:
                    self.made += 1
                    numbers[inode] = -self.made if is_folder else self.made
                inside = names[number][entry.name] = numbers.setdefault(inode, self.numbers.get(inode, TOP))
                if is_folder:
                    visit(Path(entry.path), inside)
                else:
                    content[inside] = Path(entry.path).read_bytes()

        visit(self.top, TOP)
        old, new = _entries(self.names), _entries(names)
        gone = [(folder, name, None) for folder, name in old if (folder, name) not in new]
        come = [(*place, node) for place, node in new.items() if old.get(place) != node]
        left = {old[folder, name] for folder, name, _ in gone}
        moved = [entry for entry in come if entry[2] in left]
        if moved:
            whence = [entry for entry in gone if old[entry[:2]] in {node for _, _, node in moved}]
            self.log.append(Changed((*whence, *moved)))
            gone = [entry for entry in gone if entry not in whence]
        self.log += [Changed((entry,)) for entry in (*gone, *(entry for entry in come if entry not in moved))]
        self.log += [Written(file, new) for file, new in content.items() if self.content.get(file) != new]
        self.names, self.content, self.numbers = names, content, numbers

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def looked_at(*arguments: Any, **options: Any) -> Any:
            with self._lock:
                self.look()
                try:
                    return function(*arguments, **options)
                finally:
                    self.look()

        return looked_at

    def fsync(self, descriptor: int) -> None:
        with self._lock:
            self.look()
            self._fsync(descriptor)
            inode = os.fstat(descriptor).st_ino
            if inode in self.numbers:
                self.log.append(Synced(self.numbers[inode]))

    def failpoint(self, name: str) -> None:
        """Where a commit says that it is done: what its last rename put into place is promised from here on."""
        with self._lock:
            self.look()
            if name.startswith("committed-") or name == "after-part":
                *_, last = (change for change in self.log if isinstance(change, Changed) and len(change.names) > 1)
                (folder, target, node) = last.names[-1]
                assert node is not None
                within = {node} if node > 0 else _reached(self.names, node)
                if name == "after-part":  # the last rename was the hash's
                    within.add(self.names[folder][target.removesuffix(".xxh3")])
                self.log.append(Promised(tuple(sorted(file for file in within if file > 0))))


@dataclass
class Disk:
    """Names and bytes that are kept, and what is known of and may be lost."""

    names: Names = field(default_factory=lambda: {TOP: {}})
    content: dict[int, bytes] = field(default_factory=dict)
    written: dict[int, bytes] = field(default_factory=dict)
    changed: list[Changed] = field(default_factory=list)
    promised: set[int] = field(default_factory=set)

    def do(self, operation: Operation) -> None:
        match operation:
            case Changed():
                self.changed.append(operation)
            case Written(file, content):
                self.written[file] = content
            case Synced(node) if node > 0:
                if node in self.written:
                    self.content[node] = self.written.pop(node)
            case Synced(node):
                now = [change for change in self.changed if any(entry[0] == node for entry in change.names)]
                self.names = _after(self.names, now)
                self.changed = [change for change in self.changed if change not in now]
            case Promised(files):
                self.promised.update(files)

    def must_be_there(self) -> dict[int, bytes]:
        """What was promised and has not been removed since, even in the cache."""
        there = _reached(_after(self.names, self.changed), TOP)
        return {file: self.content.get(file, b"") for file in self.promised if file in there}

    def promised_by_name(self) -> Tree:
        """Path -> bytes, as a process would see them."""
        files = {**self.content, **self.written}
        everything = _tree(
            _after(self.names, self.changed), {file: files.get(file, b"") for file in self.promised}, TOP, ""
        )
        return {path: content for path, content in everything if content is not None}

    def crashes(self, source: random.Random) -> Iterator[tuple[Tree, dict[int, bytes]]]:
        """What may be found after the power failed now: the tree, and the files in it by their number.

        Of the changes of names none is kept, all are, each alone, all but each, and some at random.
        """
        anywhere = _after(self.names, [Changed(tuple(e for e in c.names if e[2] is not None)) for c in self.changed])
        reached = _reached(anywhere, TOP) | _reached(self.names, TOP)
        self.changed = [change for change in self.changed if any(entry[0] in reached for entry in change.names)]
        each = range(len(self.changed))
        kept = [set[int](), set(each), *({n} for n in each), *(set(each) - {n} for n in each)]
        kept = kept[:2] + source.sample(kept[2:], min(16, len(kept) - 2))
        kept += [{n for n in each if source.random() < 0.5} for _ in range(4 if len(each) > 2 else 0)]
        for numbers in kept:
            names = _after(self.names, [change for n, change in enumerate(self.changed) if n in numbers])
            for torn in (lambda _: b"", lambda new: new, lambda new: new[: len(new) // 2], lambda new: bytes(len(new))):
                # what was synced before may still be found as it was then
                now = {file: torn(new) or self.content.get(file, b"") for file, new in self.written.items()}
                found = {**self.content, **now}
                files = {file: found.get(file, b"") for file in _reached(names, TOP) if file > 0}
                yield dict(_tree(names, files, TOP, "")), files


def _entries(names: Names) -> dict[tuple[int, str], int]:
    return {(folder, name): node for folder, inside in names.items() for name, node in inside.items()}


def _after(names: Names, changes: Iterable[Changed]) -> Names:
    names = {folder: dict(inside) for folder, inside in names.items()}
    for change in changes:
        for folder, name, node in change.names:
            if node is None:
                names.get(folder, {}).pop(name, None)
            else:
                names.setdefault(folder, {})[name] = node
    return names


def _reached(names: Names, folder: int) -> set[int]:
    inside = names.get(folder, {}).values()
    return {folder, *inside}.union(*(_reached(names, node) for node in inside if node < 0))


def _tree(names: Names, files: dict[int, bytes], folder: int, path: str) -> Iterator[tuple[str, bytes | None]]:
    for name, node in names.get(folder, {}).items():
        yield path + name, files.get(node)
        if node < 0:
            yield from _tree(names, files, node, f"{path}{name}/")


def put(tree: Tree, top: Path) -> Path:
    """Makes a real folder hold the tree, and nothing else."""
    for path in sorted(top.rglob("*"), reverse=True):
        name = path.relative_to(top).as_posix()
        if name not in tree or path.is_dir() != (tree[name] is None):
            path.rmdir() if path.is_dir() else path.unlink()
    for name, content in tree.items():  # folders come before what is in them
        if content is None:
            (top / name).mkdir(exist_ok=True)
        elif not (top / name).is_file() or (top / name).read_bytes() != content:
            (top / name).write_bytes(content)
    return top
