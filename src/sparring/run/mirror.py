"""A copy of a run on object storage: every committed folder, file by file, its manifest last.

Object stores have no rename. A mirrored folder is committed once its MANIFEST.json exists: a reader verifies every file
against it, and commits its local copy by rename.
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
FOLDERS = re.compile(r"(?!.*\.damaged-)(rows|data|(start|iter-\d{2,})/(benchmarks/)?\w[\w.+-]*|judged/\w[\w.+-]*)")
"""The folders that a run commits. Nothing else is sent or fetched: no paths with .., no corrupted folders set aside."""


class Mirror:
    """The destination: s3://, gs:// or abfs:// as pyarrow supports them, or file://."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if "@" in parts.netloc:
            raise UserError(f"mirror: {parts.scheme}://...: remove the secret; the store's client finds credentials.")
        self.name = uri.partition("?")[0]
        try:
            self.store, root = fs.FileSystem.from_uri(uri)
            self.root = root.rstrip("/")
            self.is_folder = isinstance(self.store, fs.LocalFileSystem)
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"mirror: unsupported URI {uri}: {error}. Use s3://, gs://, abfs:// or a local path."
            ) from error

    def send(self, run: RunDir, folder: Path) -> None:
        """Copies a committed folder, unless the mirror has it with the same manifest."""
        with self._reached("sent to"):
            there = f"{self.root}/{folder.relative_to(run.root).as_posix()}"
            if self._read(f"{there}/{MANIFEST}") == (folder / MANIFEST).read_bytes():
                return
            if self._exists(f"{there}/{MANIFEST}"):
                self.store.delete_file(f"{there}/{MANIFEST}")  # first: without it the mirrored folder does not exist
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
        """Copies a single file that may change: the recipe, the sessions, the report."""
        with self._reached("sent to"):
            self._upload(path, f"{self.root}/{path.relative_to(run.root).as_posix()}")

    def fetch(self, run: RunDir) -> list[Path]:
        """Fetches and commits every mirrored folder that is missing here; returns them."""
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
        """The sealed recipe of the mirrored run, if there is one."""
        with self._reached("fetched from"):
            text = self._read(f"{self.root}/recipe.yaml")
            return None if text is None else text.decode("utf-8")

    def _folders(self) -> Iterator[Path]:
        """The mirrored folders, in the order of the run."""
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
                        raise CorruptedError(f"{there}/{MANIFEST} lists '{name}', which is outside its folder")
                    self._download(f"{there}/{name}", temporary / name)
                verify(temporary)
                rename_into_place(temporary, folder)
        except CorruptedError as problem:
            raise RunError(
                f"mirror: {self.name}: {problem}. Delete {there}/{MANIFEST} to have it sent again."
            ) from problem
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _upload(self, path: Path, there: str) -> None:
        if self.is_folder:
            make_folder(Path(there).parent)
        # an interrupted stream leaves no object: the store assembles the parts when it is closed
        with path.open("rb") as source, self.store.open_output_stream(there) as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
        if self.is_folder:  # a store confirms an object when it is durable; a disk needs a sync
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
                f"mirror: a file could not be {what} {self.name}: {error}. Everything committed here is intact; the "
                "same command continues, and sends what the mirror lacks."
            ) from error


def committed_folders(run: RunDir) -> Iterator[Path]:
    """The committed folders of a local run, in their order."""
    places = ("start/*", "start/benchmarks/*", "iter-*/*", "iter-*/benchmarks/*", "judged/*")
    for folder in (run.rows, run.data, *(folder for place in places for folder in sorted(run.root.glob(place)))):
        if FOLDERS.fullmatch(folder.relative_to(run.root).as_posix()) and is_committed(folder):
            yield folder
