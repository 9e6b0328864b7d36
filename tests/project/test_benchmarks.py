"""The scripts in benchmarks/ take hours, so nothing runs them often. What they share with the package must fit it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sparring.model.load import load_model
from sparring.model.logprobs import Scorer
from sparring.model.packing import pack_shared
from sparring.types import Group

pytest.importorskip("trl")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_every_script_can_be_imported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "bare_vllm":
        pytest.skip("it runs in vLLM's environment")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(os, "environ", dict(os.environ))  # some set variables for libraries that they import
    assert importlib.import_module(path.stem)


def test_the_plain_loop_computes_what_sparring_does(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    plain_scores = importlib.import_module("step_arms").plain_scores
    model = load_model(tiny / "model", dtype=torch.float32, device=torch.device("cpu"))
    random = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return random.integers(3, 20, count).astype(np.int32)

    groups = [Group(str(n), ids(4 + n), {"real": (ids(6),), "generated": (ids(3), ids(5))}) for n in range(2)]
    with torch.no_grad():
        expected = plain_scores(model, groups)
        batch = pack_shared(groups)
        found = batch.scores(Scorer(model)(batch))
    for role in ("real", "generated"):
        torch.testing.assert_close(found[role], expected[role], atol=1e-4, rtol=1e-5)
