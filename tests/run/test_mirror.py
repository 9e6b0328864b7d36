"""A run on object storage: against a real S3 server (moto's) on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from sparring.errors import RunError, RunMismatch, UserError
from sparring.loop import play
from sparring.recipe.schema import Recipe
from sparring.run import mirror as module
from sparring.run.manifest import MANIFEST, commit, verify
from sparring.run.mirror import Mirror, committed_folders
from sparring.run.rundir import RunDir

server = pytest.importorskip("moto.server")

pytestmark = pytest.mark.slow

WEIGHTS = "iter-00/train/model/model.safetensors"


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket, as `s3://bucket/{}?...`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("ACCESS_KEY_ID", "key"),
            ("SECRET_ACCESS_KEY", "secret"),
            ("EC2_METADATA_DISABLED", "true"),
        ):
            patch.setenv(f"AWS_{name}", value)
        running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        uri = f"s3://runs/{{}}?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
        fs.FileSystem.from_uri(uri.format("") + "&allow_bucket_creation=true")[0].create_dir("runs")
        yield uri
        running.stop()


@pytest.fixture
def folder_of_a_run(tmp_path: Path) -> tuple[RunDir, Path]:
    run = RunDir(tmp_path / "run")
    final = run.stage(0, "train")
    with commit(final) as folder:
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_bytes(bytes(range(256)) * 200_000)  # more than one part of an upload
        (folder / "metrics.jsonl").write_text("{}\n")
    return run, final


def keys(uri: str) -> list[str]:
    store, root = fs.FileSystem.from_uri(uri)
    found = store.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    return sorted(info.path.removeprefix(f"{root}/") for info in found if info.type == fs.FileType.File)


def test_a_folder_as_a_mirror_is_synced_before_its_manifest_is_written(
    folder_of_a_run: tuple[RunDir, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, final = folder_of_a_run
    there = tmp_path / "mirror"
    copy = there / "iter-00" / "train"
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(module, "sync", lambda path: synced.append((path, (copy / MANIFEST).exists())))
    mirror = Mirror(there.as_uri())
    mirror.send(run, final)
    before = {path for path, is_committed in synced if not is_committed}
    assert before == {copy, copy / "metrics.jsonl", copy / "model", copy / "model" / "weights"}
    assert [path for path, is_committed in synced if is_committed] == [copy / MANIFEST, copy]
    (copy / MANIFEST).write_text("that of another folder")
    synced.clear()
    mirror.send(run, final)
    assert synced[0] == (copy, False), "that the old one is gone, before anything is replaced"


def test_a_lost_disk_costs_the_stage_that_was_running_and_no_more(
    make_recipe: Callable[..., Recipe], tmp_path: Path, s3: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("tspin", iterations=2, mirror=s3.format("whole"))
    alone = play(recipe.model_copy(update={"mirror": None}), tmp_path / "alone").run
    play(recipe.model_copy(update={"iterations": 1}), tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    run = play(recipe, tmp_path / "second").run
    trained = {path: path.stat().st_mtime_ns for path in run.root.rglob("*.safetensors")}
    assert (run.root / WEIGHTS).read_bytes() == (alone.root / WEIGHTS).read_bytes()
    last = "iter-01/train/model/model.safetensors"
    assert (run.root / last).read_bytes() == (alone.root / last).read_bytes()
    assert play(recipe, run.root).run and trained == {p: p.stat().st_mtime_ns for p in run.root.rglob("*.safetensors")}
    there = keys(s3.format("whole"))
    for folder in committed_folders(run):
        below = folder.relative_to(run.root).as_posix()
        assert {f"{below}/{name}" for name in verify(folder).files} | {f"{below}/{MANIFEST}"} <= set(there)
    assert {"recipe.yaml", "env.json", "report.html"} <= set(there)

    with pytest.raises(RunMismatch, match="holds a run with other settings"):
        play(make_recipe("tspin", iterations=2, seed=7, mirror=s3.format("whole")), tmp_path / "other")
    fetched = play(recipe, tmp_path / "elsewhere").run
    assert (fetched.root / last).read_bytes() == (alone.root / last).read_bytes()
    assert "Fetched 8 finished stages" in capsys.readouterr().err


def test_every_committed_folder_comes_back_and_no_other(tmp_path: Path) -> None:
    """The store is a folder here."""
    run = RunDir(tmp_path / "run")
    names = ("data", "start/evaluate", "start/benchmarks/gsm8k-5", "iter-00/generate", "iter-107/benchmarks/a.b+c")
    for name in (*names, "judged/one-against-two", "iter-00/train.damaged-1", "elsewhere/train"):
        with commit(run.root / name) as folder:
            (folder / "file").write_text(name)
    mirror = Mirror((tmp_path / "store").as_uri())
    for folder in committed_folders(run):
        mirror.send(run, folder)
    back = RunDir(tmp_path / "back")
    fetched = {folder.relative_to(back.root).as_posix() for folder in mirror.fetch(back)}
    assert fetched == {*names, "judged/one-against-two"}


def test_nothing_is_there_until_its_manifest_is(
    folder_of_a_run: tuple[RunDir, Path], s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, final = folder_of_a_run
    uri = s3.format("torn")

    def die(name: str) -> None:
        raise KeyboardInterrupt(name)

    with monkeypatch.context() as patch:
        patch.setattr(module, "failpoint", die)
        with pytest.raises(KeyboardInterrupt, match="before-mirror-train"):
            Mirror(uri).send(run, final)
    assert "iter-00/train/model/weights" in keys(uri) and f"iter-00/train/{MANIFEST}" not in keys(uri)
    elsewhere = RunDir(tmp_path / "elsewhere")
    assert Mirror(uri).fetch(elsewhere) == []
    Mirror(uri).send(run, final)
    assert Mirror(uri).fetch(elsewhere) == [elsewhere.stage(0, "train")]
    assert verify(elsewhere.stage(0, "train")) == verify(final)


def test_a_stage_that_was_made_again_replaces_the_old_one(
    folder_of_a_run: tuple[RunDir, Path], s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, final = folder_of_a_run
    uri = s3.format("again")
    Mirror(uri).send(run, final)
    shutil.rmtree(final)
    with commit(final) as folder:
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')

    def die(name: str) -> None:
        raise KeyboardInterrupt(name)

    with monkeypatch.context() as patch:
        patch.setattr(module, "failpoint", die)
        with pytest.raises(KeyboardInterrupt):
            Mirror(uri).send(run, final)
    assert Mirror(uri).fetch(RunDir(tmp_path / "between")) == [], (
        "neither the old one, of which files are gone, nor the new"
    )
    Mirror(uri).send(run, final)
    after = RunDir(tmp_path / "after")
    Mirror(uri).fetch(after)
    assert (after.stage(0, "train") / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_damage_on_the_store_is_found_and_nothing_is_committed(
    folder_of_a_run: tuple[RunDir, Path], s3: str, tmp_path: Path
) -> None:
    run, final = folder_of_a_run
    uri = s3.format("damaged")
    Mirror(uri).send(run, final)
    store, root = fs.FileSystem.from_uri(uri)
    with store.open_output_stream(f"{root}/iter-00/train/metrics.jsonl") as file:
        file.write(b"[]\n")
    elsewhere = RunDir(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"metrics.jsonl is corrupted.*Delete runs/damaged/iter-00/train/MANIFEST.json"):
        Mirror(uri).fetch(elsewhere)
    assert not list(elsewhere.root.rglob("*.*"))
    store.delete_file(f"{root}/iter-00/train/metrics.jsonl")
    with pytest.raises(RunError, match="metrics.jsonl is missing"):
        Mirror(uri).fetch(elsewhere)


def test_a_stranger_s_store_writes_nowhere_else(folder_of_a_run: tuple[RunDir, Path], s3: str, tmp_path: Path) -> None:
    from sparring.run.manifest import seal_json

    _, final = folder_of_a_run
    uri = s3.format("hostile")
    store, root = fs.FileSystem.from_uri(uri)
    content = json.loads((final / MANIFEST).read_text())
    del content["xxh3"]
    content["files"] = {"../../../escaped": {"bytes": 1, "xxh3": "0" * 32}}
    for folder in ("iter-00/train", "elsewhere/train"):
        with store.open_output_stream(f"{root}/{folder}/{MANIFEST}") as file:
            file.write(seal_json(content).encode())
    with pytest.raises(RunError, match="outside its folder"):
        Mirror(uri).fetch(RunDir(tmp_path / "a" / "b" / "run"))
    assert not list(tmp_path.rglob("*escaped*")) and not list(tmp_path.rglob("elsewhere"))


def test_an_unsupported_mirror_is_refused(make_recipe: Callable[..., Recipe], tmp_path: Path, s3: str) -> None:
    for uri, words in (
        ("ftp://host/x", "unsupported URI"),
        ("s3://key:secret@bucket/x", "remove the secret"),
    ):
        with pytest.raises(UserError, match=words) as refusal:
            play(make_recipe("sft", mirror=uri), tmp_path / "run")
        assert "key:secret" not in str(refusal.value)
    with pytest.raises(RunError, match="could not be"):
        play(make_recipe("sft", mirror=s3.format("x").replace("runs", "no-such-bucket")), tmp_path / "run")
