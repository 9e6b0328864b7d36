"""One of the ranks of a stage: it does its share, ends with the process that started it, and says why it ends early."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback

import torch

from sparring import logging as progress
from sparring.errors import Interrupted, OutOfMemory, Refused, Stopped
from sparring.parallel import distributed, interrupt
from sparring.parallel.torchrun import STARTER
from sparring.recipe.load import load_own_recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import replace_file
from sparring.run.rundir import RunDir
from sparring.stages.evaluate import evaluate
from sparring.stages.generate import engine_of, generate_parts
from sparring.stages.score import score
from sparring.stages.train.loop import train


def main() -> None:
    """`python -m sparring.stages.worker RUN ITERATION STAGE`"""
    _end_with_starter()
    run, index, stage = RunDir(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    recipe = load_own_recipe(run.recipe).at(index)
    iteration, number = Iteration(run, recipe, index), int(os.environ["RANK"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    interrupt.follow(run.ranks / "stop")
    try:
        distributed.join(recipe.parallel if stage == "train" else "ddp", recipe.rank_timeout)
        if stage == "generate":
            generate_parts(iteration, engine_of(iteration), number, distributed.num_ranks())
        elif number:
            progress.console.quiet = True
            _do(iteration, stage)
        else:
            with run.ranks_lock(recipe.rank_timeout):
                _do(iteration, stage)
    except Interrupted:
        if number == 0 and stage != "generate":
            (run.ranks / "kept").touch()  # what the stage has done is on disk: no other rank is waited for long
    except Exception as error:
        kind = "RankLost" if distributed.is_lost(error) else type(error).__name__
        if isinstance(error, Refused):
            kind, words = "Refused", str(error)
        elif kind == "RankLost":
            words = f"rank {number} lost another rank, which has died or did not answer in time ({error})"
        elif isinstance(error, Stopped):
            kind, words = "OutOfMemory" if isinstance(error, OutOfMemory) else "Stopped", str(error)
        else:
            traceback.print_exc()
            words = f"rank {number} failed with {type(error).__name__}: {error}"
        replace_file(run.ranks / f"rank-{number}", json.dumps([kind, words]))
        os._exit(1)  # at once: the backend's threads may hang
    os._exit(0)


def _do(iteration: Iteration, stage: str) -> None:
    match stage:
        case "score":
            score(iteration)
        case "train":
            train(iteration)
        case "evaluate":
            evaluate(iteration, engine_of(iteration))
        case _:
            raise ValueError(stage)
    distributed.meet()  # none ends while another still needs it


def _end_with_starter() -> None:
    """On Linux: killed when the process that started us ends, even if it is killed, even if we hang."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if str(os.getppid()) != os.environ[STARTER]:
        sys.exit("the process that started this rank is gone")


if __name__ == "__main__":
    main()
