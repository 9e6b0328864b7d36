"""`sparring launch --print`: a job file for a cluster's scheduler, to be read, changed and submitted by a person."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Literal

import jinja2

from sparring.errors import UserError

Scheduler = Literal["slurm", "kubernetes"]
FILES = {"slurm": "slurm.sh.j2", "kubernetes": "kubernetes.yaml.j2"}


def job_file(
    scheduler: Scheduler, recipe: Path, run_dir: Path, *, nodes: int, gpus: int, image: str | None, claim: str | None
) -> str:
    """A Slurm script, or Kubernetes objects, for `sparring run RECIPE RUN_DIR` on `nodes` machines of `gpus` devices.

    The paths are those on the cluster: nothing is read here.
    """
    for path in (recipe, run_dir):
        if not path.is_absolute() or any(ord(character) < 32 for character in str(path)):
            raise UserError(f"{str(path)!r}: a job starts in a directory of its own; give a path from / on the cluster")
    if scheduler == "kubernetes" and (image is None or claim is None):
        raise UserError(
            "--print kubernetes needs --image, with sparring in it, and --claim, the PersistentVolumeClaim "
            "(ReadWriteMany) of the volume that holds the recipe, the model, the rows and the run directory"
        )
    environment = jinja2.Environment(  # noqa: S701  (no HTML; every value goes through a filter of the file's language)
        loader=jinja2.PackageLoader("sparring.commands.jobs", "."),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shell": lambda value: shlex.quote(str(value)), "yaml": json.dumps}
    name = re.sub(r"[^a-z0-9]+", "-", run_dir.name.lower()).strip("-")[:40].strip("-") or "run"
    return environment.get_template(FILES[scheduler]).render(
        name=f"sparring-{name}",
        command=["sparring", "run", str(recipe), str(run_dir)],
        nodes=nodes,
        gpus=gpus,
        image=image,
        claim=claim,
        volume=str(Path(*run_dir.parts[:2])),
    )
