"""Starts a program as ranks of this machine, by torchrun's own code; light, so that it starts at once.

`python -m sparring.parallel.torchrun RANKS THREADS NOTE -m MODULE ARGUMENTS`: where a rank dies, NOTE says which one, and how
(one that ends with status 1 has said why by itself).
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
    logging.disable(logging.ERROR)  # what torchrun would say about a rank that fails, ours says
    count, threads, note, *words = sys.argv[1:]
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ[LAUNCHER_PID] = str(os.getpid())
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch advises against what `distributed` asks of DDP
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=int(count),
        run_id="sparring",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        # else a folder for temporary files, which is left there when this process is killed
        logs_specs=DefaultLogsSpecs(log_dir=str(Path(note).with_name("logs"))),
    )
    try:
        elastic_launch(config, sys.executable)(*words)
    except ChildFailedError as failed:
        # torchrun ends the others with SIGTERM: the cause is what ended in another way
        for rank, one in sorted(failed.failures.items(), key=lambda item: item[1].exitcode != -signal.SIGTERM):
            how = f"was ended by {one.signal_name()}" if one.exitcode < 0 else f"ended with status {one.exitcode}"
            if one.exitcode != 1:
                Path(note).write_text(f"rank {rank} {how}", encoding="utf-8")
        sys.exit(1)


if __name__ == "__main__":
    main()
