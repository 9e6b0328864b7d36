"""One rank and two: the same losses and gradient norms, with DDP and with FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from forked_ranks import forked_process
from safetensors.torch import load_file
from steps import ARMS, run
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparring.parallel import SingleProcess
from sparring.parallel.fsdp2 import shard_within_nodes

pytestmark = pytest.mark.slow

STEPS = 20


@pytest.fixture(scope="module")
def alone(tiny: Path) -> dict[str, np.ndarray]:
    here = SingleProcess()
    return {
        f"{packing}/{pieces}": np.array(run(tiny / "model", packing, pieces, STEPS, here)) for packing, pieces in ARMS
    }


def ranks_run(count: int, *words: object, folder: Path) -> Any:
    """What the ranks of `steps.py` found."""
    script, out = Path(__file__).with_name("steps.py"), folder / "out.json"
    start = ["python", "-m", "sparring.parallel.torchrun", str(count), "1", str(folder / "note")]
    with forked_process([*start, str(script), *map(str, words), str(out)]) as ranks:
        assert ranks.wait(timeout=500) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_ranks_train_as_one(parallel: str, tiny: Path, tmp_path: Path, alone: dict[str, np.ndarray]) -> None:
    found = ranks_run(2, tiny / "model", parallel, STEPS, folder=tmp_path)
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


def test_two_nodes_of_two_ranks_train_as_one(tiny: Path, tmp_path: Path, alone: dict[str, np.ndarray]) -> None:
    """They shard within a node and replicate across the two; each row of a checkpoint is written once."""
    found = ranks_run(4, tiny / "model", "two nodes", 5, folder=tmp_path)
    assert found.pop("mesh") == [[0, 1], [2, 3]] and found.pop("topology") == "4 x fsdp2 on 2 nodes"
    files = list((tmp_path / "step-00000001").glob("rank-*.safetensors"))
    written = sum(tensor.numel() for file in files for tensor in load_file(file).values())
    assert len(files) == 4 and written == found.pop("num_parameters")
    for arm, values in found.items():
        assert np.abs(np.array(values) / alone[arm][:5] - 1).max() < 1e-6, arm


def test_loading_may_take_longer_than_a_step(tiny: Path, tmp_path: Path) -> None:
    """The main rank waits without a deadline for a model to be loaded, longer at first, and seconds from then on."""
    assert ranks_run(2, tiny / "model", "late", 1, folder=tmp_path) == [False, False, True]


@pytest.mark.parametrize(
    ("num_ranks", "ranks_per_node", "shape"),
    [(64, 8, (8, 8)), (16, 8, (2, 8)), (8, 8, None), (8, 1, None), (9, 2, None)],
)
def test_a_mesh_of_nodes(num_ranks: int, ranks_per_node: int, shape: tuple[int, int] | None) -> None:
    config = shard_within_nodes(num_ranks, ranks_per_node)
    if shape is None:
        assert config is None
        return
    assert isinstance(config, ParallelismConfig)
    dist.init_process_group("fake", store=FakeStore(), rank=ranks_per_node, world_size=num_ranks)
    try:
        mesh = config.get_device_mesh("cpu")[tuple(config.fsdp_dim_names)]
        assert tuple(mesh.shape) == shape
        assert mesh.mesh[1].tolist() == list(range(ranks_per_node, 2 * ranks_per_node)), "a row is a node"
    finally:
        dist.destroy_process_group()
