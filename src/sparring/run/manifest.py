"""Atomic commits, and manifests that are verified on reading.

A directory is committed by writing it under a temporary name beside its final one, syncing every file, writing
MANIFEST.json last, and renaming. A directory with its final name is therefore complete, and a reader accepts it only if
every file still has the size and hash that the manifest lists.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import xxhash

from sparring.errors import CorruptedError, RunError
from sparring.run.disk import writing

MANIFEST = "MANIFEST.json"
MANIFEST_VERSION = 2
READS = ".input_digests.json"

SEAL = re.compile(r'xxh3[": ]+([0-9a-f]{32})')
UNSEALED = "0" * 32

Json = dict[str, object]


def failpoint(name: str) -> None:
    """Exits like kill -9 if SPARRING_FAIL_AT names this point ("name", or "name:n" for the n-th pass). For tests."""
    wanted, _, nth = os.environ.get("SPARRING_FAIL_AT", "").partition(":")
    if wanted == name:
        _passes[name] = _passes.get(name, 0) + 1
        if _passes[name] == int(nth or 1):
            os._exit(137)


_passes: dict[str, int] = {}


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Like `mkdir -p`, but synced: a power loss that removes a folder removes everything committed in it."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for folder in missing:
        with suppress(PermissionError):  # a folder that may not be listed cannot be synced
            sync(folder.parent)


def hash_file(path: Path) -> str:
    """xxh3_128: detects corruption and mix-ups at disk speed. Not a defense against attackers."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def hash_path(path: Path) -> str:
    """Hash of a file, or of a folder's files with their names, hidden ones excluded."""
    if path.is_file():
        return hash_file(path)
    files = sorted(f for f in path.rglob("*") if f.is_file() and not f.relative_to(path).as_posix().startswith("."))
    return _digest({f.relative_to(path).as_posix(): hash_file(f) for f in files})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_file(path: Path, text: str) -> None:
    """Replaces a file atomically: a reader sees the old or the new text."""
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with writing(path):
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            failpoint(f"replace-{path.name}")
            temporary.rename(path)
            sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def seal(text: str) -> str:
    """Inserts the hash of a text into its own placeholder (`xxh3`, then UNSEALED)."""
    return text.replace(UNSEALED, xxhash.xxh3_128_hexdigest(text.encode()), 1)


def seal_json(content: Json) -> str:
    return seal(json.dumps({"xxh3": UNSEALED, **content}, indent=1) + "\n")


def read_sealed(path: Path) -> str:
    """A sealed text, if every byte is as it was written."""
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorruptedError(f"{path} cannot be read: {error}") from error
    found = SEAL.search(text)
    if not found or seal(text.replace(found[1], UNSEALED, 1)) != text:
        raise CorruptedError(f"{path} is corrupted or was edited: its hash does not match")
    return text


def _digest(hashes: Mapping[str, str]) -> str:
    return xxhash.xxh3_128(json.dumps(dict(sorted(hashes.items()))).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    files: Mapping[str, Mapping[str, object]]  # name -> bytes, xxh3
    input_digests: Mapping[str, str]  # path of each input -> digest
    info: Json

    def digest(self, inside: str = "") -> str:
        """Digest of the files below `inside`, by content."""
        return _digest({n: str(f["xxh3"]) for n, f in self.files.items() if n.startswith(inside)})


@contextmanager
def commit(
    final: Path, *, input_digests: Mapping[str, str] | None = None, info: Json | None = None, required_bytes: int = 0
) -> Iterator[Path]:
    """Yields a folder to write into, which becomes `final` when the block ends without an error.

    `required_bytes`: roughly how many bytes will be written.
    """
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex}")
    try:
        with writing(final, required_bytes):
            make_folder(final.parent)
            temporary.mkdir()
            yield temporary
            commit_folder(temporary, final, input_digests=input_digests, info=info)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def commit_folder(
    work: Path, final: Path, *, input_digests: Mapping[str, str] | None = None, info: Json | None = None
) -> None:
    """Commits the folder `work`, which lies beside `final`, as `final`."""
    if final.exists():
        raise RunError(f"{final} exists, but is not a committed folder of this run. Move it away.")
    with writing(final):
        (work / MANIFEST).unlink(missing_ok=True)  # from a commit that was interrupted before its rename
        files: dict[str, Json] = {}
        for path in sorted(p for p in work.rglob("*") if p.is_file() and p.name != READS):
            sync(path)
            beside = hash_beside(path)  # of a part: it was hashed when it was written, perhaps by another machine
            digest = beside.read_text(encoding="utf-8") if beside.is_file() else hash_file(path)
            files[path.relative_to(work).as_posix()] = {"bytes": path.stat().st_size, "xxh3": digest}
        for folder in sorted(p for p in work.rglob("*") if p.is_dir()):
            sync(folder)
        failpoint(f"before-manifest-{final.name}")
        content = {
            "version": MANIFEST_VERSION,
            "files": files,
            "input_digests": dict(input_digests or {}),
            "info": info or {},
        }
        (work / MANIFEST).write_text(seal_json(content), encoding="utf-8")
        sync(work / MANIFEST)
        (work / READS).unlink(missing_ok=True)
        sync(work)
        failpoint(f"before-rename-{final.name}")
        work.rename(final)
        sync(final.parent)
    failpoint(f"committed-{final.name}")


def remove_leftovers(leftovers: Iterable[Path]) -> None:
    """Removes what interrupted commits left behind. The caller must hold the run directory."""
    for leftover in leftovers:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def begin_work(work: Path, input_digests: Mapping[str, str]) -> Path:
    """The work folder of a stage that keeps partial results; emptied if they were made from other inputs."""
    note, text = work / READS, seal_json(dict(input_digests))
    if work.exists() and not _was_made_from(work, input_digests, text):
        shutil.rmtree(work)
    if not work.exists():
        with writing(work):
            make_folder(work)
    if not note.exists():
        replace_file(note, text)
    return work


def _was_made_from(work: Path, input_digests: Mapping[str, str], text: str) -> bool:
    """By its note; or, if a commit was interrupted after removing the note, by its manifest."""
    note = work / READS
    if note.is_file() or not is_committed(work):
        return note.is_file() and note.read_bytes() == text.encode()
    try:
        return dict(read_manifest(work).input_digests) == dict(input_digests)
    except RunError:
        return False


def copy_committed(source: Path, final: Path) -> None:
    """Copies a committed directory atomically, after verifying every file."""
    manifest = verify(source)
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex}")
    try:
        with writing(final, sum(cast(int, file["bytes"]) for file in manifest.files.values())):
            make_folder(final.parent)
            shutil.copytree(source, temporary)
            failpoint(f"before-copy-{final.name}")
            rename_into_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def rename_into_place(temporary: Path, final: Path) -> None:
    """Renames a folder that has its manifest to its final name, after syncing its files."""
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    temporary.rename(final)
    sync(final.parent)


def commit_part(path: Path, write: Callable[[Path], None]) -> None:
    """Adds one file to an uncommitted folder, with its hash beside it to show that it is complete."""
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        with writing(path):
            write(temporary)
            sync(temporary)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    failpoint("before-part")
    temporary.rename(path)
    replace_file(hash_beside(path), hash_file(path))
    failpoint("after-part")


def has_part(path: Path) -> bool:
    """Whether a file that `commit_part` wrote exists and matches its hash."""
    beside = hash_beside(path)
    return path.is_file() and beside.is_file() and beside.read_bytes() == hash_file(path).encode()


def hash_beside(path: Path) -> Path:
    """The file that `commit_part` writes last."""
    return path.with_name(path.name + ".xxh3")


def is_committed(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> Manifest:
    try:
        content = json.loads(read_sealed(path / MANIFEST))
    except CorruptedError as problem:
        raise CorruptedError(f"{problem}; {_remedy(path)}") from problem
    if content["version"] != MANIFEST_VERSION:
        raise RunError(
            f"{path / MANIFEST} has version {content['version']}, and this sparring reads version {MANIFEST_VERSION}. "
            "Continue with the sparring that wrote it, or use another run directory."
        )
    return Manifest(content["files"], content["input_digests"], content["info"])


def verify(path: Path) -> Manifest:
    """The manifest of a committed directory, after verifying every file."""
    manifest = read_manifest(path)
    for name in manifest.files:
        _check(path, name, manifest)
    return manifest


def verified(path: Path, name: str) -> Path:
    """One file of a committed directory, after verifying that file only."""
    _check(path, name, read_manifest(path))
    return path / name


def _check(path: Path, name: str, manifest: Manifest) -> None:
    file, entry = path / name, manifest.files.get(name)
    if entry is None or not file.is_file():
        raise CorruptedError(f"{file} is missing; {_remedy(path)}")
    if file.stat().st_size != entry["bytes"] or hash_file(file) != entry["xxh3"]:
        raise CorruptedError(f"{file} is corrupted: its bytes differ from those that were committed; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"'sparring run' recreates {path}"
