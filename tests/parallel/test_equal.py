"""One rank and two: the same losses and gradient norms, with DDP and with FSDP2."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from forked_ranks import forked_process
from steps import ARMS, run

from sparring.parallel import SingleProcess

pytestmark = pytest.mark.slow

STEPS = 20


@pytest.fixture(scope="module")
def alone(tiny: Path) -> dict[str, np.ndarray]:
    here = SingleProcess()
    return {
        f"{packing}/{pieces}": np.array(run(tiny / "model", packing, pieces, STEPS, here)) for packing, pieces in ARMS
    }


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(parallel: str, tiny: Path, tmp_path: Path, alone: dict[str, np.ndarray]) -> None:
    script, out = Path(__file__).with_name("steps.py"), tmp_path / "out.json"
    words = [str(script), str(tiny / "model"), parallel, str(STEPS), str(out)]
    start = ["python", "-m", "sparring.parallel.torchrun", "2", "1", str(tmp_path / "note")]
    with forked_process([*start, *words]) as ranks:
        assert ranks.wait(timeout=500) == 0
    found = json.loads(out.read_text())
    norms, unchanged = found.pop("after_nan")
    assert list(np.isfinite(norms)) == [True, False, True] and unchanged == [False, True, False]
    if parallel == "fsdp2":
        difference, dtypes = found.pop("in_bfloat16")
        assert 0 < difference < 0.01
        assert dtypes == [["torch.bfloat16", "torch.float32"]], "weights are gathered in it, the residual stream is not"
        stored = run(tiny / "model", "shared", 1, 3, SingleProcess(), is_stored_in_bfloat16=True)
        assert np.array(found.pop("stored_in_bfloat16")) == pytest.approx(np.array(stored), rel=1e-6)
        assert np.array(found.pop("offloaded")) == pytest.approx(alone["shared/1"][:3], rel=1e-6)
    found = {arm: np.array(values) for arm, values in found.items()}
    for arm, one in alone.items():
        residual = found[arm] / one - 1
        assert np.abs(residual).max() < 1e-6, (arm, np.abs(residual).max(axis=0))
        # no drift: the mean over the steps is within what rounding to either side leaves
        spread = residual.std(axis=0, ddof=1) / STEPS**0.5
        assert (np.abs(residual.mean(axis=0)) <= 4 * spread + 1e-8).all(), (arm, residual.mean(axis=0), spread)
    wrong = found["wrong"][:, 1] / alone["shared/1"][:3, 1] - 1
    assert np.abs(wrong).max() > 0.4, "the comparison sees a gradient that was averaged once too often"
