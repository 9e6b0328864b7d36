"""One rank of a stage. It ends with the process that started it, and leaves a note if it ends early."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from contextlib import nullcontext

import torch

from sparring import logging
from sparring.errors import Interrupted, OutOfMemory, RunError, UserError
from sparring.parallel import interrupt
from sparring.parallel.ddp import Ddp
from sparring.parallel.fsdp2 import Fsdp2
from sparring.parallel.rendezvous import Rendezvous, is_lost_rank
from sparring.parallel.torchrun import LAUNCHER_PID
from sparring.run.iteration import Iteration
from sparring.run.manifest import replace_file
from sparring.run.rundir import RunDir
from sparring.run.session import load_sealed_recipe
from sparring.stages.generate import backend_factory, generate_parts
from sparring.stages.launch import run_here

TIMEOUT_SECONDS = 40.0
"""How long a rank waits in a step's collective, or for a heartbeat; SPARRING_RANK_TIMEOUT overrides it."""


def main() -> None:
    """`python -m sparring.stages.worker RUN ITERATION STAGE`"""
    _end_with_launcher()
    run, index, stage = RunDir(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    iteration, rank = Iteration(run, load_sealed_recipe(run.recipe).at(index), index), int(os.environ["RANK"])
    timeout = float(os.environ.get("SPARRING_RANK_TIMEOUT", TIMEOUT_SECONDS))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    interrupt.follow(run.ranks / "stop")
    try:
        rendezvous = Rendezvous(timeout)
        recipe = iteration.recipe
        if stage == "train" and recipe.is_sharded:
            offload = recipe.parallel == "fsdp2_offload"
            parallel = Fsdp2(rendezvous, getattr(torch, recipe.train.dtype), offload=offload)
        else:
            parallel = Ddp(rendezvous)
        if stage == "generate":
            generate_parts(iteration, backend_factory(iteration), rank, parallel.num_ranks)
        else:
            logging.console.quiet = not parallel.is_main
            with run.ranks_lock(timeout) if parallel.is_main else nullcontext():
                run_here(iteration, stage, parallel)
                parallel.barrier()  # no rank exits while another still needs it
    except Interrupted:
        if rank == 0 and stage != "generate":
            (run.ranks / "kept").touch()  # the stage's progress is on disk: the launcher need not wait for all ranks
    except Exception as error:
        replace_file(run.ranks / f"rank-{rank}", json.dumps(_reason(error, rank)))
        os._exit(1)  # at once: the backend's threads may hang
    os._exit(0)


def _reason(error: Exception, rank: int) -> tuple[str, str]:
    """(kind, message) for the launcher; a bug's traceback goes to the log."""
    if isinstance(error, UserError):
        return "UserError", str(error)
    if is_lost_rank(error, int(os.environ["WORLD_SIZE"])):
        return "RankLost", f"rank {rank} lost another rank, which died or did not answer in time ({error})"
    if isinstance(error, OutOfMemory):
        return "OutOfMemory", str(error)
    if isinstance(error, RunError):
        return "RunError", str(error)
    traceback.print_exc()
    return type(error).__name__, f"rank {rank} failed with {type(error).__name__}: {error}"


def _end_with_launcher() -> None:
    """On Linux the kernel kills this process when its launcher ends, even if either of them hangs or is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if str(os.getppid()) != os.environ[LAUNCHER_PID]:
        sys.exit("the process that started this rank is gone")


if __name__ == "__main__":
    main()
