"""Locks that belong to what is asked for, and an audit that can fail."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    loader = SourceFileLoader(f"script_{name}", str(ROOT / "scripts" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project as far as locks are concerned."""
    for name in ("scripts", "locks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def check(folder: Path) -> tuple[int, str]:
    command = [sys.executable, str(folder / "scripts" / "lock"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_locks_belong_to_the_requirements(copy: Path) -> None:
    code, said = check(copy)
    assert code == 0, said
    assert said.count("each with hashes") == 2
    locked = script("audit").locked()
    assert {"torch", "transformers", "pytest", "pydantic"} <= set(locked)
    assert locked["torch"] == {"2.13.0", "2.13.0+cpu"}


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("pyproject.toml", '"numpy>=2"', '"numpy>=2.1"', "other requirements; run scripts/lock"),
        ("constraints.txt", "torch==2.13.0", "torch==2.13.1", "other requirements; run scripts/lock"),
        ("locks/cpu.txt", "    --hash=sha256:", "    --hash=md5:", "is no version with a hash"),
        ("locks/cuda.txt", "numpy==", "numpy>=", "is no version with a hash"),
    ],
)
def test_other_requirements_and_missing_hashes_are_seen(
    file: str, old: str, new: str, complaint: str, copy: Path
) -> None:
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    code, said = check(copy)
    assert code == 1 and complaint in said


def test_a_version_below_a_floor_is_seen(tmp_path: Path) -> None:
    audit = script("audit")
    good = audit.locked()
    assert audit.below_floor(good) == []
    (problem,) = audit.below_floor({**good, "torch": {"2.9.1", "2.13.0+cpu"}})
    assert "torch 2.9.1 is locked: 2.10 is the first without CVE-2025-32434" in problem
    assert "filelock is not locked" in audit.below_floor({k: v for k, v in good.items() if k != "filelock"})[0]
    project = tmp_path / "pyproject.toml"
    project.write_text('[project]\ndependencies = ["transformers>=4.56"]\n')
    assert "takes transformers from 4.56 on: 5.3" in audit.below_floor(good, project)[0]


def test_an_audit_that_cannot_see_says_so() -> None:
    audit = script("audit")
    versions = {"torch": {"2.13.0"}, "filelock": {"3.20.0"}}
    known = {("jinja2", "3.1.2"): ["A-1"], ("filelock", "3.20.0"): ["A-2", "A-3"]}
    assert audit.advisories(versions, lambda asked: [known.get(a, []) for a in asked]) == ["filelock 3.20.0: A-2, A-3"]
    assert audit.advisories({"torch": {"2.13.0"}}, lambda asked: [known.get(a, []) for a in asked]) == []
    for blind in (lambda asked: [[] for _ in asked], lambda asked: [["A-1"]], lambda asked: {}["results"]):
        with pytest.raises(OSError, match=r"api\.osv\.dev"):
            audit.advisories(versions, blind)
