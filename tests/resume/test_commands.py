"""What is not a run: comparisons, exports, reports, trackers. Killed, or on a full disk, and the same command again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_disk import may_mount

from sparring.commands.compare import compare
from sparring.commands.export import export_model, export_pairs, push_folder
from sparring.errors import UserError
from sparring.loop import play
from sparring.recipe.load import dump_recipe
from sparring.recipe.schema import Recipe
from sparring.run.manifest import begin_work, commit_folder, commit_part, has_part, read_manifest, verify
from sparring.run.results import Results
from sparring.run.rundir import RunDir

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
SMALL = {
    "iterations": 1,
    "generate": {"max_new_tokens": 3},
    "train": {"epochs": 1, "batch_size": 64},
    "evaluate": {"checker": None},
    "threads": 1,
}


@pytest.fixture(scope="module")
def finished(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Results:
    recipe = make_recipe("spin", data={"held_out": 0, "limit": 48}, **SMALL)
    return play(recipe, tmp_path_factory.mktemp("finished") / "run")


def die_at(point: str, act: Callable[[], Any]) -> int:
    child = os.fork()
    if child == 0:
        os.environ["SPARRING_FAIL_AT"] = point
        try:
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def committed(root: Path) -> dict[str, bytes]:
    """Weights and tables of every run below."""
    kept = [p for p in root.rglob("*") if p.suffix in (".parquet", ".safetensors") and ".tmp-" not in str(p)]
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in kept}


def test_a_comparison_that_is_killed_resumes(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe("spin", **SMALL)

    def act(root: Path) -> Any:
        return compare(recipe, root, ["spin", "space"], seeds=1)

    for point in ("replace-comparison.yaml", "before-copy-generate", "before-copy-score", "replace-report.html"):
        assert die_at(point, lambda: act(tmp_path / "killed")) == 137, f"{point} was never passed"
    act(tmp_path / "killed")
    act(tmp_path / "straight")
    assert committed(tmp_path / "killed") == committed(tmp_path / "straight")
    assert not list((tmp_path / "killed").rglob("*.tmp-*"))
    copied = tmp_path / "killed" / "seed-0" / "space" / "iter-00" / "generate"
    assert verify(copied).files, "what was copied carries its maker's manifest"


def test_a_comparison_s_own_settings_are_sealed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    from sparring.commands.compare import check_comparison_settings

    whole = RunDir(tmp_path)
    check_comparison_settings(whole, make_recipe("spin"))
    check_comparison_settings(whole, make_recipe("spin"))
    file = tmp_path / "comparison.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(UserError, match=r"comparison\.yaml is corrupted or was edited"):
        check_comparison_settings(whole, make_recipe("spin", seed=1))


@pytest.mark.parametrize("kind", ["a model", "pairs"])
def test_an_export_that_is_killed_leaves_no_half_and_is_repeated(kind: str, finished: Results, tmp_path: Path) -> None:
    out = tmp_path / "out [1]"

    def act(to: Path) -> Any:
        return export_pairs(finished, to) if kind == "pairs" else export_model(finished, to, iteration="0")

    for point in (f"before-manifest-{out.name}", f"before-rename-{out.name}"):
        assert die_at(point, lambda: act(out)) == 137
        assert not out.exists() and len(list(tmp_path.glob(".out [[]1].tmp-*"))) == 1
        (tmp_path / ".out other.tmp-1").mkdir(exist_ok=True)
    act(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out other.tmp-1", out.name], "another's is left alone"
    act(tmp_path / "straight")
    names = {p.name for p in out.iterdir()}
    assert all((out / n).read_bytes() == (tmp_path / "straight" / n).read_bytes() for n in names - {"MANIFEST.json"})


def test_an_upload_that_is_killed_is_repeated(
    finished: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the hub, on disk. What is uploaded goes in one commit of the hub's, which is whole or is not."""
    import huggingface_hub

    class Hub:
        def create_repo(self, repo: str, **_: object) -> None:
            (tmp_path / "hub").mkdir(exist_ok=True)

        def repo_info(self, *_: object, **__: object) -> SimpleNamespace:
            return SimpleNamespace(private=True)

        def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **_: object) -> None:
            for name in allow_patterns:
                shutil.copy(folder_path / name, tmp_path / "hub" / name)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    export_model(finished, tmp_path / "out", iteration="0")
    assert die_at("before-upload", lambda: push_folder(tmp_path / "out", "me/it", is_public=False)) == 137
    assert list((tmp_path / "hub").iterdir()) == []
    files = push_folder(tmp_path / "out", "me/it", is_public=False)
    assert sorted(p.name for p in (tmp_path / "hub").iterdir()) == sorted(f.name for f in files)
    (damaged := tmp_path / "out" / "model.safetensors").write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(Exception, match=r"model\.safetensors is corrupted"):
        push_folder(tmp_path / "out", "me/it", is_public=False)


def test_parts_survive_a_death_between_the_manifest_and_the_rename(tmp_path: Path) -> None:
    """The note of what they were made from is gone by then: the manifest says the same."""
    final, digests = tmp_path / "generate", {"model": "a"}

    def act() -> None:
        work = begin_work(tmp_path / ".generate.partial", digests)
        commit_part(work / "part-00000.parquet", lambda path: path.write_bytes(b"answers"))
        commit_folder(work, final, input_digests=digests)

    assert die_at("before-rename-generate", act) == 137
    work = begin_work(tmp_path / ".generate.partial", digests)
    assert has_part(work / "part-00000.parquet"), "nothing is drawn again"
    commit_folder(work, final, input_digests=digests)
    assert read_manifest(final).input_digests == digests and not (final / ".input_digests.json").exists()
    shutil.rmtree(final)
    assert die_at("before-rename-generate", act) == 137
    assert not has_part(begin_work(tmp_path / ".generate.partial", {"model": "b"}) / "part-00000.parquet")


DRIVER = """
import gc, json, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import sparring.cli, sparring.commands.compare, sparring.commands.export, sparring.report  # once, and not in each child
import tensorboard.summary, torch.utils.tensorboard, transformers.models.llama.modeling_llama
from sparring.run.manifest import is_committed, verify

gc.collect()
gc.freeze()
disk, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
sparring.report.draw_held_out = sparring.report.draw_training = lambda results: []
found = {}
for name, words in commands.items():
    subprocess.run(["rm", "-rf", *map(str, disk.iterdir())], check=True)
    found[name] = []
    for size in (8192, 2**26):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
        child = os.fork()
        if child == 0:
            os.dup2(os.open(disk.parent / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.argv = ["sparring", *words]
            sparring.cli.main()
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for folder in [p for p in disk.rglob("*") if is_committed(p) and ".tmp-" not in str(p)]:
            verify(folder)
        left = [str(p) for p in disk.rglob("*.tmp-*")]
        found[name].append([size, code, (disk.parent / "said").read_text(), left])
        if code == 0:
            break
print(json.dumps(found))
"""


@pytest.mark.skipif(not may_mount(), reason="no disk of one's own may be mounted here")
def test_every_command_that_writes_says_that_the_disk_is_full(
    finished: Results, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(make_recipe("spin", **SMALL)))
    recipe, run = str(tmp_path / "recipe.yaml"), str(finished.run.root)
    commands = {
        "export": ["export", run, str(disk / "out"), "--iteration", "0"],
        "pairs": ["export", run, str(disk / "pairs"), "--pairs"],
        "compare": ["compare", recipe, str(disk / "compare"), "--methods", "spin,space", "--seeds", "1"],
        "a tracker": ["run", recipe, str(disk / "run"), "track=[tensorboard]"],
    }
    mount = (
        f"mount -t tmpfs -o size=8k none {disk} && exec {sys.executable} {tmp_path / 'driver.py'} {disk} "
        f"'{json.dumps(commands)}'"
    )
    done = subprocess.run(["unshare", "-rm", "bash", "-c", mount], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, outcomes in json.loads(done.stdout.splitlines()[-1]).items():
        codes = [code for _, code, _, _ in outcomes]
        assert codes[0] != 0 and codes[-1] == 0, (name, codes, [said[-500:] for *_, said, _ in outcomes])
        for size, code, said, left in outcomes:
            assert not left, (name, size, left)
            if code:
                assert code in (1, 2) and "Traceback" not in said, (name, size, said)
                assert str(disk) in said and ("are free" in said or "were free" in said), (name, size, said)
