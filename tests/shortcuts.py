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


class Command:
    """A command in a forked process, which has imported everything: torch and transformers take seconds."""

    def __init__(self, *arguments: str | Path) -> None:
        self.arguments = ["sparring", *map(str, arguments)]
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115
        self.process = os.fork()
        if self.process == 0:
            self._run()

    def _run(self) -> None:
        status = 1
        try:
            for target, source in (
                (0, os.open(os.devnull, os.O_RDONLY)),
                (1, self.out.fileno()),
                (2, self.err.fileno()),
            ):
                os.dup2(source, target)
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = self.arguments
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self) -> subprocess.CompletedProcess[str]:
        status = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        with self.out as out, self.err as err:
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(self.arguments, status, out.read(), err.read())


def sparring(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return Command(*arguments).wait()
