"""Atomic commits, manifests, damage, the lock, lineage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.errors import RunError, RunMismatch, UserError
from sparring.run.manifest import MANIFEST, commit, commit_part, has_part, hash_path, is_committed, verify
from sparring.run.rundir import RunDir


def make(folder: Path, text: str = "hello") -> Path:
    with commit(folder, input_digests={}, info={"seconds": 1}) as work:
        (work / "a.txt").write_text(text)
        (work / "deep").mkdir()
        (work / "deep" / "b.bin").write_bytes(bytes(range(256)) * 10)
    return folder


def test_a_commit_is_whole_or_not_there(tmp_path: Path) -> None:
    final = tmp_path / "stage"
    with pytest.raises(RuntimeError), commit(final) as work:
        (work / "a.txt").write_text("half")
        assert not final.exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    make(final)
    assert is_committed(final)
    assert sorted(verify(final).files) == ["a.txt", "deep/b.bin"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_and_every_cut_is_found(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = make(tmp_path_factory.mktemp("run") / "stage")
    file = folder / data.draw(st.sampled_from(["a.txt", "deep/b.bin"]))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        content[bit // 8] ^= 1 << bit % 8
    else:
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    file.write_bytes(bytes(content))
    with pytest.raises(RunError, match="corrupted"):
        verify(folder)


def test_a_missing_file_and_a_broken_manifest_are_found(tmp_path: Path) -> None:
    folder = make(tmp_path / "one")
    (folder / "a.txt").unlink()
    with pytest.raises(RunError, match=r"a\.txt is missing"):
        verify(folder)
    folder = make(tmp_path / "two")
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:50])
    with pytest.raises(RunError, match="'sparring run' recreates .*two"):
        verify(folder)


def test_parts_are_accepted_only_whole(tmp_path: Path) -> None:
    part = tmp_path / "work" / "part-0.parquet"
    assert not has_part(part)
    commit_part(part, lambda path: path.write_bytes(b"rows"))
    assert has_part(part)
    part.write_bytes(b"rowz")
    assert not has_part(part)


def test_digests_are_of_content(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    first, second = make(tmp_path / "one"), make(tmp_path / "two")
    assert run.digest(first) == run.digest(second)
    assert run.digest(first / "deep") != run.digest(first)
    assert run.digest(make(tmp_path / "three", "other")) != run.digest(first)
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("x")
    assert run.digest(outside) == hash_path(outside)
    with pytest.raises(RunError, match="does not exist yet"):
        run.digest(tmp_path / "nothing")


def test_a_stage_made_from_something_else_is_refused(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    outside = tmp_path.parent / f"{tmp_path.name}-rows.jsonl"
    outside.write_text("rows")
    with commit(tmp_path / "stage", input_digests=RunDir(tmp_path).input_digests(source, outside)) as work:
        (work / "x").write_text("made from source")
    RunDir(tmp_path).check_lineage(tmp_path / "stage")
    outside.write_text("other rows")
    with pytest.raises(RunMismatch, match="has changed since"):
        RunDir(tmp_path).check_lineage(tmp_path / "stage")
    outside.unlink()
    RunDir(tmp_path).check_lineage(tmp_path / "stage")  # what is gone cannot have changed a finished stage
    for file in sorted(source.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    source.rmdir()
    make(source, "another model")
    with pytest.raises(RunError, match="was made from another source"):
        RunDir(tmp_path).check_lineage(tmp_path / "stage")


def test_a_second_owner_is_refused_and_told_who_owns_it(tmp_path: Path) -> None:
    with RunDir(tmp_path).own():
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), RunDir(tmp_path).own():
            pass
        assert RunDir(tmp_path).owner() is not None
    assert RunDir(tmp_path).owner() is None
    with RunDir(tmp_path).own():
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, signal\n"
        "from sparring.run.rundir import RunDir\n"
        f"with RunDir({str(tmp_path)!r}).own():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert RunDir(tmp_path).owner() is None
    with RunDir(tmp_path).own():
        pass


def test_the_owner_sweeps_what_a_killed_commit_left(tmp_path: Path) -> None:
    (tmp_path / "iter-00" / ".train.tmp-abc").mkdir(parents=True)
    (tmp_path / "iter-00" / ".train.partial").mkdir()
    (tmp_path / ".recipe.yaml.tmp-abc").write_text("half")
    with RunDir(tmp_path).own():
        left = sorted(p.name for p in tmp_path.rglob("*") if not p.name.startswith((".lock", ".owner")))
        assert left == [".train.partial", "iter-00"], "work in progress stays"


def test_manifests_hold_no_clock_in_what_is_compared(tmp_path: Path) -> None:
    content = json.loads((make(tmp_path / "one") / MANIFEST).read_text())
    assert set(content) == {"xxh3", "version", "files", "input_digests", "info"}
    assert all(set(entry) == {"bytes", "xxh3"} for entry in content["files"].values())
