"""The script for GPUs runs from one end to the other, with small sizes on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_script_for_gpus_runs() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "on_gpu.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([script, "--tiny"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert "failed" not in done.stdout, done.stderr
    assert max(result["kernels"].values()) < 1e-4
    assert max(result["layouts"]["pieces"]) < 1e-4
    cases = [name for name in result if name.startswith("training")]
    assert len(cases) == 2
    for name in cases:
        assert result[name]["shared"]["row_tokens_per_second"] > 0
