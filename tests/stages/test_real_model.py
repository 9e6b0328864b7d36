"""The first step on a pretrained chat model in bfloat16: no false stop, and another iterate than the opponent is found.

SmolLM2-135M-Instruct, 540 MB, is looked for in SPARRING_SMOLLM2, or beside the project.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from torch import Tensor

from sparring.commands.demo import problems
from sparring.errors import RunError
from sparring.loop import run_stage
from sparring.objectives import Sipo, Space, Spin, Tspin
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.examples import load_training_examples
from sparring.run.iteration import Iteration
from sparring.run.rundir import RunDir
from sparring.run.schedule import Schedule
from sparring.run.session import check_settings
from sparring.stages.prepare import prepare
from sparring.stages.train.policy import Policy, load_policy
from sparring.stages.train.step import (
    check_policy_equals_opponent,
    check_start_loss,
    forward_backward,
    scoring_noise,
)
from sparring.types import Lengths, Loss, Scores

SHARED = Path(__file__).parents[3] / "shared"

pytestmark = pytest.mark.slow

MODEL = Path(os.environ.get("SPARRING_SMOLLM2", SHARED / "models" / "SmolLM2-135M-Instruct"))
METHODS = (Spin(), Spin(lambda_=5.0), Space(), Sipo(), Tspin(beta=0.0))
ROWS = 2
MICRO_BATCH_TOKENS = 256


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iteration:
    """Two rows, answered by the model."""
    if not (MODEL / "config.json").is_file():
        pytest.skip(f"SmolLM2-135M-Instruct is not at {MODEL}; set SPARRING_SMOLLM2 to its folder")
    folder = tmp_path_factory.mktemp("smollm2")
    rows = problems(ROWS, seed=3, largest=90)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "model": str(MODEL),
            "method": "spin",
            "data": {"train": str(folder / "rows.jsonl"), "held_out": 0},
            "generate": {"max_new_tokens": 16},
            "train": {"dtype": "bfloat16", "batch_size": ROWS, "micro_batch_tokens": MICRO_BATCH_TOKENS},
        }
    )
    run = RunDir(folder / "run")
    run.root.mkdir()
    iteration = Iteration(run, check_settings(run, recipe), 0)
    prepare(run, recipe)
    run_stage(iteration, "generate")
    return iteration


class Every(Spin):
    """The loss of every method, from one forward pass."""

    def __call__(self, policy: Scores, opponent: Scores, lengths: Lengths) -> Loss:
        losses = {str(place): method(policy, opponent, lengths).per_example for place, method in enumerate(METHODS)}
        return Loss(losses["0"], losses)


class ForwardOnly(SingleProcess):
    """Skips backward passes, which take minutes in bfloat16 on a CPU without instructions for it."""

    def backward(self, loss: Tensor) -> None:
        pass


def first_step(iteration: Iteration, policy: Policy, parallel: SingleProcess) -> dict[str, float]:
    examples = load_training_examples(iteration)
    batch = Schedule(iteration.recipe.train, len(examples), iteration.seed).batch(examples, 0)
    for method in METHODS:
        check_start_loss(method, batch)
    return forward_backward(policy, Every(), batch, MICRO_BATCH_TOKENS, 0.0, parallel)


@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_every_method_starts_and_another_iterate_is_found(
    packing: str, generated: Iteration, monkeypatch: pytest.MonkeyPatch
) -> None:
    if packing == "padded":
        monkeypatch.setattr("sparring.model.logprobs.why_not_shared", lambda model: "the test asks for it")
    shutil.rmtree(generated.stage("score"), ignore_errors=True)
    run_stage(generated, "score")
    policy, noise = load_policy(generated, SingleProcess()), scoring_noise(generated)
    assert policy.scorer.packing == packing
    metrics = first_step(generated, policy, SingleProcess())
    assert metrics["log_ratio"] == 0
    for place, method in enumerate(METHODS):
        check_policy_equals_opponent(method, metrics, "bfloat16", noise)
        assert method.start_loss is None or metrics[str(place)] == pytest.approx(method.start_loss, rel=1e-6)

    for group in policy.optimizer.param_groups:
        group["lr"] = 5e-7
    policy.optimizer.step()  # another iterate, after a single update at the published rate
    metrics = first_step(generated, policy, ForwardOnly())
    print(packing, "log-ratio of the other iterate", metrics["log_ratio"], "noise", noise)
    for method in METHODS[:-1]:
        with pytest.raises(RunError, match="the policy must equal its opponent"):
            check_policy_equals_opponent(method, metrics, "bfloat16", noise)
