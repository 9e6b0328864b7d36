"""`sparring launch`: prints a job file for a cluster's scheduler, for the user to review and submit."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Literal

import jinja2

from sparring.errors import UserError

Scheduler = Literal["slurm", "kubernetes", "sky"]
FILES: dict[Scheduler, str] = {"slurm": "slurm.sh.j2", "kubernetes": "kubernetes.yaml.j2", "sky": "sky.yaml.j2"}


def job_file(
    scheduler: Scheduler,
    recipe: Path,
    run_dir: Path,
    *,
    nodes: int,
    gpus: int,
    gpu: str | None = None,
    image: str | None = None,
    claim: str | None = None,
) -> str:
    """A Slurm script, Kubernetes manifests or a SkyPilot task for `sparring run RECIPE RUN_DIR` on `nodes` machines.

    The paths are paths on the cluster. Nothing is read here.
    """
    for path in (recipe, run_dir):
        if not path.is_absolute() or any(ord(character) < 32 for character in str(path)):
            raise UserError(f"{str(path)!r} is not an absolute path. Give the path on the cluster, starting with /.")
    if scheduler == "kubernetes" and (image is None or claim is None):
        raise UserError(
            "--print kubernetes needs --image, a container image with sparring, and --claim, a ReadWriteMany "
            "PersistentVolumeClaim with the recipe, the model, the data and the run directory."
        )
    if scheduler == "sky" and gpus and gpu is None:
        raise UserError("--print sky needs --gpu, SkyPilot's name of the accelerator, such as H100. Or set --gpus 0.")
    if scheduler == "sky" and nodes > 1 and claim is None:
        raise UserError("--print sky needs --claim for several machines: a volume that all of them mount.")
    environment = jinja2.Environment(  # noqa: S701  (not HTML; a filter quotes every value)
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
        gpu=gpu,
        image=image,
        claim=claim,
        volume=str(Path(*run_dir.parts[:2])),
    )
