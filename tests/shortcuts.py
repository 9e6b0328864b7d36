"""Calls that many tests make: a command, a step in one process, and the generations of an iteration by row."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

from sparring.cli import main
from sparring.model.logprobs import Scorer
from sparring.parallel import SingleProcess
from sparring.run.examples import read_iteration
from sparring.run.iteration import Iteration
from sparring.stages.train.policy import Policy
from sparring.stages.train.step import forward_backward
from sparring.types import Generation, Objective, TrainingExample


def step_metrics(
    scorer: Scorer,
    objective: Objective,
    examples: Sequence[TrainingExample],
    micro_batch_tokens: int,
    sft_weight: float = 0.0,
) -> dict[str, float]:
    """The metrics of a step. Leaves its gradients in the model."""
    policy = Policy(scorer.model, scorer, scorer, torch.optim.SGD(scorer.parameters()))
    return forward_backward(policy, objective, examples, micro_batch_tokens, sft_weight, SingleProcess())


def generations(iteration: Iteration, index: int) -> dict[str, list[Generation]]:
    """What iteration `index` of the same run generated, by row id, in the order of samples."""
    return {id: list(answers) for id, answers in groupby(read_iteration(iteration, index), key=lambda one: one.id)}


def sparring(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command in a forked process, which has imported everything: torch and transformers take seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            try:
                for target, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out.fileno()), (2, err.fileno())):
                    os.dup2(source, target)
                sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
                sys.argv = ["sparring", *map(str, arguments)]
                os.chdir(cwd or Path.cwd())
                main()
                status = 0
            except SystemExit as end:
                status = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["sparring", *map(str, arguments)], status, out.read(), err.read())
