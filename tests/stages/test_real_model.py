"""The first step on a pretrained chat model in bfloat16: no false stop, and another iterate than the opponent is found.

SmolLM2-135M-Instruct, 540 MB, is looked for in SPARRING_SMOLLM2, or beside the project.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SHARED

from sparring.commands.demo import problems
from sparring.loop import run_stage
from sparring.objectives import Sipo, Space, Spin, Tspin
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.examples import load_training_examples
from sparring.run.iteration import Iteration
from sparring.run.manifest import read_manifest
from sparring.run.rundir import RunDir
from sparring.run.schedule import Schedule
from sparring.run.session import check_settings
from sparring.stages.prepare import prepare
from sparring.stages.train.micro_batches import choose_micro_batch_tokens
from sparring.stages.train.policy import Policy, load_policy
from sparring.stages.train.step import (
    check_policy_equals_opponent,
    check_start_loss,
    forward_backward,
    scoring_noise,
)
from sparring.types import Objective

pytestmark = pytest.mark.slow

MODEL = Path(os.environ.get("SPARRING_SMOLLM2", SHARED / "models" / "SmolLM2-135M-Instruct"))
METHODS = (Spin(), Spin(lambda_=5.0), Space(), Sipo(), Tspin(beta=0.0))
ROWS = 6


@pytest.fixture(scope="module", params=["shared", "padded"])
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iteration]:
    """Six rows, answered and scored by the model."""
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"SmolLM2-135M-Instruct is not at {MODEL}; set SPARRING_SMOLLM2 to its folder")
    folder = tmp_path_factory.mktemp(request.param)
    rows = problems(ROWS, seed=3, largest=90)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "model": str(MODEL),
            "method": "spin",
            "data": {"train": str(folder / "rows.jsonl"), "held_out": 0},
            "generate": {"max_new_tokens": 24},
            "train": {"dtype": "bfloat16", "batch_size": ROWS},
        }
    )
    run = RunDir(folder / "run")
    run.root.mkdir()
    iteration = Iteration(run, check_settings(run, recipe), 0)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "padded":
            patch.setattr("sparring.model.logprobs.why_not_shared", lambda model: "the test asks for it")
        prepare(run, recipe)
        for stage in ("generate", "score"):
            run_stage(iteration, stage)
        yield iteration


def first_step(iteration: Iteration, policy: Policy, objective: Objective) -> dict[str, float]:
    examples = load_training_examples(iteration)
    batch = Schedule(iteration.recipe.train, len(examples), iteration.seed).batch(examples, 0)
    check_start_loss(objective, batch)
    tokens = choose_micro_batch_tokens(iteration, policy, examples, SingleProcess())
    return forward_backward(policy, objective, batch, tokens, 0.0, SingleProcess())


def test_every_method_starts_and_another_iterate_is_found(scored: Iteration) -> None:
    policy = load_policy(scored, SingleProcess())
    noise = read_manifest(scored.stage("score")).info
    print({**noise, "packing": policy.scorer.packing})
    for objective in METHODS:
        metrics = first_step(scored, policy, objective)
        print(objective, metrics["loss"], metrics.get("log_ratio"))
        check_policy_equals_opponent(objective, metrics, "bfloat16", scoring_noise(scored))
        if objective.start_loss is not None:
            assert metrics["log_ratio"] == 0
            assert metrics["loss"] == pytest.approx(objective.start_loss, rel=1e-6)
