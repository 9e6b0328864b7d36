"""Several processes for one stage, started by torchrun, one per device; what they make is committed by ours."""

from __future__ import annotations

import os
import sys

import torch

from sparring.errors import Refused, Stopped
from sparring.generate import begin_parts, engine_of, generate_parts
from sparring.iteration import Iteration
from sparring.processes import guarded
from sparring.recipe_file import load_own_recipe
from sparring.rundir import RunDir


def draw_on_devices(iteration: Iteration) -> None:
    """Draws the parts of the generate stage that are missing. A part is the same whichever process draws it."""
    begin_parts(iteration)
    processes = str(iteration.recipe.processes)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    with guarded([*command, "-m", "sparring.launch", str(iteration.run.root), str(iteration.index)]) as launcher:
        status = launcher.wait()
    if status:
        raise Stopped(
            f"a process of generate ended with an error, see above; torchrun ended with status {status}. "
            "The parts that were committed are intact; the same command continues"
        )


def main() -> None:
    """One of the processes: draws every n-th missing part. The run belongs to the process that started torchrun."""
    run, index = RunDir(sys.argv[1]), int(sys.argv[2])
    recipe = load_own_recipe(run.recipe)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    iteration = Iteration(run, recipe.at(index), index)
    try:
        generate_parts(iteration, engine_of(iteration), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    except Refused as refusal:
        sys.exit(f"error: {refusal}")


if __name__ == "__main__":
    main()
