"""A copy of a run on object storage: every committed folder, file by file, its manifest last.

A store has no rename. There a folder is committed when its MANIFEST.json is: whoever reads takes a folder that has one,
checks every file against it, and commits the copy here by the rename that this disk has.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from pyarrow import fs

from sparring.errors import CorruptedError, RunError, UserError
from sparring.run.disk import writing
from sparring.run.manifest import (
    MANIFEST,
    failpoint,
    is_committed,
    make_folder,
    read_manifest,
    rename_into_place,
    replace_file,
    sync,
    verify,
)
from sparring.run.rundir import RunDir

CHUNK = 2**24
FOLDERS = re.compile(r"(?!.*\.damaged-)(data|(start|iter-\d{2,})/(benchmarks/)?\w[\w.+-]*|judged/\w[\w.+-]*)")
"""What a run commits. Nothing else is sent or taken: no names with .. in them, no damaged folders set aside."""


class Mirror:
    """Where a run is copied to: s3://, gs:// or abfs:// as pyarrow takes them, or file://."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if "@" in parts.netloc:
            raise UserError(
                f"mirror: {parts.scheme}://...: leave the secret out; the store's client finds it in its own way"
            )
        self.name = uri.partition("?")[0]
        try:
            self.store, root = fs.FileSystem.from_uri(uri)
            self.root = root.rstrip("/")
            self.is_folder = isinstance(self.store, fs.LocalFileSystem)
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"mirror: '{uri}' is none that pyarrow knows, such as s3://bucket/folder: {error}"
            ) from error

    def send(self, run: RunDir, folder: Path) -> None:
        """Copies a committed folder. One that is there already, with the same manifest, is left alone."""
        with self._reached("sent to"):
            there = f"{self.root}/{folder.relative_to(run.root).as_posix()}"
            if self._read(f"{there}/{MANIFEST}") == (folder / MANIFEST).read_bytes():
                return
            if self._exists(f"{there}/{MANIFEST}"):
                self.store.delete_file(f"{there}/{MANIFEST}")  # first: from here on there is no such folder
                if self.is_folder:
                    sync(Path(there))
            for name in read_manifest(folder).files:
                self._upload(folder / name, f"{there}/{name}")
            failpoint(f"before-mirror-{folder.name}")
            self._upload(folder / MANIFEST, f"{there}/{MANIFEST}")

    def send_all(self, run: RunDir) -> None:
        """Copies every committed folder, the recipe and the sessions."""
        for folder in committed_folders(run):
            self.send(run, folder)
        for note in (run.recipe, run.env):
            self.send_note(run, note)

    def send_note(self, run: RunDir, path: Path) -> None:
        """Copies a single file that is replaced now and then: the recipe, the sessions, the report."""
        with self._reached("sent to"):
            self._upload(path, f"{self.root}/{path.relative_to(run.root).as_posix()}")

    def fetch(self, run: RunDir) -> list[Path]:
        """Commits here every folder that is committed there and missing here; returns them."""
        with self._reached("fetched from"):
            fetched = []
            for path in self._folders():
                folder = run.root / path
                if not folder.exists():
                    self._fetch(f"{self.root}/{path.as_posix()}", folder)
                    fetched.append(folder)
            for note in (run.recipe, run.env):
                text = self._read(f"{self.root}/{note.name}")
                if fetched and text is not None and not note.exists():
                    replace_file(note, text.decode("utf-8"))
            return fetched

    def recipe(self) -> str | None:
        """The settings of the run that is there, if there is one."""
        with self._reached("fetched from"):
            text = self._read(f"{self.root}/recipe.yaml")
            return None if text is None else text.decode("utf-8")

    def _folders(self) -> Iterator[Path]:
        """Below the root, those that are committed there, in the order of the run."""
        everything = self.store.get_file_info(fs.FileSelector(self.root, recursive=True, allow_not_found=True))
        ends = sorted(info.path for info in everything if info.base_name == MANIFEST)
        for path in ends:
            below = Path(path).parent.relative_to(Path(self.root)).as_posix()
            if FOLDERS.fullmatch(below):
                yield Path(below)

    def _fetch(self, there: str, folder: Path) -> None:
        temporary = folder.with_name(f".{folder.name}.tmp-{uuid.uuid4().hex}")
        try:
            with writing(folder):
                make_folder(folder.parent)
                temporary.mkdir()
                self._download(f"{there}/{MANIFEST}", temporary / MANIFEST)
                for name in read_manifest(temporary).files:
                    if Path(name).is_absolute() or ".." in Path(name).parts:
                        raise CorruptedError(f"{there}/{MANIFEST} names '{name}', which is outside of its folder")
                    self._download(f"{there}/{name}", temporary / name)
                verify(temporary)
                rename_into_place(temporary, folder)
        except CorruptedError as problem:
            raise RunError(
                f"mirror: {self.name}: {problem}. Delete {there}/{MANIFEST} there, and it is made again"
            ) from problem
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _upload(self, path: Path, there: str) -> None:
        if self.is_folder:
            make_folder(Path(there).parent)
        # a stream that breaks leaves no object: the store makes one of the parts when it is closed
        with path.open("rb") as source, self.store.open_output_stream(there) as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
        if self.is_folder:  # a store says that an object is there when it is safe; a disk, when it is synced
            sync(Path(there))
            sync(Path(there).parent)

    def _download(self, there: str, path: Path) -> None:
        if not self._exists(there):
            raise CorruptedError(f"{there} is missing")
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.store.open_input_stream(there) as source, path.open("wb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)

    def _read(self, there: str) -> bytes | None:
        if not self._exists(there):
            return None
        with self.store.open_input_stream(there) as source:
            return source.read()

    def _exists(self, there: str) -> bool:
        return self.store.get_file_info(there).type == fs.FileType.File

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"mirror: something could not be {what} {self.name}: {error}. What was committed here is intact; the "
                "same command continues, and sends what is missing there"
            ) from error


def committed_folders(run: RunDir) -> Iterator[Path]:
    """Of a run on this disk, in the order in which they were made, as far as names tell."""
    places = ("start/*", "start/benchmarks/*", "iter-*/*", "iter-*/benchmarks/*", "judged/*")
    for folder in (run.data, *(folder for place in places for folder in sorted(run.root.glob(place)))):
        if FOLDERS.fullmatch(folder.relative_to(run.root).as_posix()) and is_committed(folder):
            yield folder
