"""Starts a program as ranks on this machine, through torchrun's own code. Imports little, so that it starts fast.

`python -m sparring.parallel.torchrun RANKS THREADS NOTE -m MODULE ARGUMENTS`: if a rank dies, NOTE says which and how
(a rank that exits with status 1 has given its reason).
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

LAUNCHER_PID = "SPARRING_LAUNCHER_PID"


def main() -> None:
    logging.disable(logging.ERROR)  # sparring reports failed ranks itself
    count, threads, note, *words = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ[LAUNCHER_PID] = str(os.getpid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch warns about find_unused_parameters
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(count),
        run_id="sparring",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        # the default is a temporary folder, which stays when this process is killed
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(note).with_name("logs"))),
    )
    try:
        elastic_launch(config, sys.executable)(*words)
    except ChildFailedError as failed:
        # torchrun ends the others with SIGTERM: the cause is the rank that ended differently
        for rank, one in sorted(failed.failures.items(), key=lambda item: item[1].exitcode != -signal.SIGTERM):
            how = f"was killed by {one.signal_name()}" if one.exitcode < 0 else f"exited with status {one.exitcode}"
            if one.exitcode != 1:
                Path(note).write_text(f"rank {rank} {how}", encoding="utf-8")
        sys.exit(1)


if __name__ == "__main__":
    main()
