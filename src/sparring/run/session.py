"""A run directory and the settings it was started with: its sealed recipe, its lineage, and what each start ran on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch

from sparring.errors import CorruptedError, RunMismatch, UserError
from sparring.logging import info
from sparring.parallel import local_device
from sparring.recipe.load import differences, dump_recipe, make_recipe
from sparring.recipe.schema import Recipe
from sparring.recipe.yaml import parse
from sparring.run.manifest import UNSEALED, read_sealed, replace_file, seal, seal_json
from sparring.run.mirror import Mirror
from sparring.run.rundir import RunDir

PACKAGES = ("sparring", "torch", "transformers", "accelerate", "safetensors", "numpy")


def seal_recipe(recipe: Recipe) -> str:
    """The resolved recipe as a run directory keeps it, with a hash that reveals a later edit."""
    return seal(
        f"# xxh3 {UNSEALED}  (written by sparring; change your own recipe, not this copy)\n{dump_recipe(recipe)}"
    )


def load_sealed_recipe(path: Path) -> Recipe:
    try:
        return _parsed(read_sealed(path), str(path))
    except CorruptedError as problem:
        raise UserError(f"{problem}. Restore its text, or use another run directory.") from problem


@lru_cache(maxsize=1)  # every stage asks, and YAML takes a twentieth of a second
def _parsed(text: str, source: str) -> Recipe:
    return make_recipe(*parse(text, source), source)


def check_settings(run: RunDir, recipe: Recipe) -> None:
    """Writes the resolved recipe, or refuses settings that would change what is already there."""
    if run.recipe.is_file() and run.has_begun:
        if changed := differences(load_sealed_recipe(run.recipe), recipe):
            raise RunMismatch(
                f"{run.root} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse another run directory, or restore the old values."
            )
    elif run.has_begun:
        raise RunMismatch(f"{run.root} has data but no recipe.yaml. Use another run directory.")
    replace_file(run.recipe, seal_recipe(recipe))


def fetch_from_mirror(run: RunDir, recipe: Recipe, mirror: Mirror) -> None:
    """Fetches finished stages that this disk lacks, unless the mirror holds a run with other settings."""
    text = mirror.recipe()
    if text is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        mirrored = Path(folder, "recipe.yaml")
        mirrored.write_text(text, encoding="utf-8")
        if changed := differences(load_sealed_recipe(mirrored), recipe):
            raise RunMismatch(
                f"mirror: {mirror.name} holds a run with other settings:\n  "
                + "\n  ".join(changed)
                + "\nUse another URI."
            )
    if fetched := mirror.fetch(run):
        info(f"Fetched {len(fetched)} finished stages from {mirror.name}.")


def is_done(run: RunDir, folder: Path) -> bool:
    """Whether a stage's folder is there, verifies, and was made from the inputs that are there now.

    A corrupted folder is set aside. Running its stage again restores the same bytes on the same machine; where it does
    not, the lineage of later stages reveals it.
    """
    if not folder.exists():
        return False
    try:
        run.verify(folder)
    except CorruptedError as problem:
        info(f"{problem}; the corrupted folder is kept as {run.set_aside(folder)}")
        return False
    run.check_lineage(folder)
    return True


def record_session(run: RunDir, packages: Sequence[str] = PACKAGES) -> None:
    """Adds to env.json what this process runs on, with a note if the software changed since the run started."""
    try:
        sessions = json.loads(read_sealed(run.env))["sessions"] if run.env.is_file() else []
    except CorruptedError as problem:
        info(f"{problem}; it is kept as {run.set_aside(run.env)}, and a new one is started")
        sessions = []
    session = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "versions": {package: version(package) for package in packages},
        "commit": source_commit(),
        "python": platform.python_version(),
        "host": platform.node(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "device": str(local_device()),
        "threads": torch.get_num_threads(),
    }
    for key in ("versions", "device", "threads"):
        if sessions and sessions[0][key] != session[key]:
            info(
                f"note: {key} were {sessions[0][key]} when this run started and are {session[key]} now. Later stages "
                "may differ in rounding."
            )
    replace_file(run.env, seal_json({"sessions": [*sessions, session]}))


def source_commit() -> str | None:
    """The git commit of the source tree that this package runs from, if it runs from one."""
    tree = Path(__file__).parents[3]
    if not (tree / ".git").exists():
        return None
    # the path comes from this file, and git gets no words of anybody else
    found = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)  # noqa: S603, S607
    return found.stdout.strip() or None
