"""The first step: training computes what was scored, and the policy is the opponent, or the run stops."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from shortcuts import step_metrics

from sparring.errors import RunError
from sparring.loop import play
from sparring.model.load import load_model
from sparring.model.logprobs import Scorer
from sparring.objectives import Space, Spin
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.examples import load_training_examples
from sparring.run.iteration import Iteration
from sparring.run.manifest import read_manifest
from sparring.run.results import Results
from sparring.stages.train.policy import load_policy
from sparring.stages.train.step import check_policy_equals_opponent, scoring_noise

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


def test_rounding_under_a_steep_loss_does_not_stop_a_run() -> None:
    """Log-ratios that measured rounding explains, and a loss that a coefficient of 5 moves far from its constant."""
    check_policy_equals_opponent(Spin(lambda_=5.0), {"log_ratio": 0.0012, "loss": 1.211}, "bfloat16", noise=0.0012)
    check_policy_equals_opponent(Space(), {"log_ratio": 0.032, "loss": 1.459}, "bfloat16", noise=0.01)
    for dtype, noise in (("bfloat16", 0.003), ("float32", 1e-6)):
        with pytest.raises(RunError, match="0.032 nats per token"):
            check_policy_equals_opponent(Space(), {"log_ratio": 0.032, "loss": 1.386}, dtype, noise)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("packing", ["shared", "padded"])
def test_training_computes_what_was_scored(
    dtype: str, packing: str, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a rate that changes nothing, log-ratios are exactly 0 in the first epoch, whose micro-batches were scored.

    In the second epoch the micro-batches are others, and what remains is the rounding that scoring measured.
    """
    if packing == "padded":
        monkeypatch.setattr("sparring.model.logprobs.why_not_shared", lambda model: "the test asks for it")
    train = {"dtype": dtype, "learning_rate": 1e-30, "epochs": 2, "checkpoint_minutes": 0}
    recipe = make_recipe({"name": "spin", "lambda": 5.0}, data={"held_out": 0, "limit": 40}, train=train)
    run = play(recipe, tmp_path / "run").run
    for t in range(2):
        assert read_manifest(run.stage(t, "train")).info["packing"] == packing
        noise = read_manifest(run.stage(t, "score")).info["noise_per_token"]
        lines = Results(run.root).training(t)
        first, second = (lines[place : place + len(lines) // 2] for place in (0, len(lines) // 2))
        assert [line["log_ratio"] for line in first] == [0.0] * len(first)
        assert all(line["loss"] == pytest.approx(math.log(2), rel=1e-6) for line in first)
        assert max(line["log_ratio"] for line in second) <= 4 * noise


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_opponent_that_is_another_iterate_is_always_found(
    dtype: str, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored with one iterate and trained from its neighbor, which a few small updates made different."""
    train = {"dtype": dtype, "learning_rate": 1e-4, "epochs": 1}
    recipe = make_recipe("spin", iterations=3, data={"held_out": 0, "limit": 40}, train=train)
    run = play(recipe, tmp_path / "run").run
    for scored_by, trained_from in ((0, 1), (1, 0), (2, 1), (1, 2)):
        iteration = Iteration(run, recipe.at(1), scored_by)
        other = Iteration(run, recipe.at(1), trained_from).opponent
        model = load_model(other, dtype=torch.float32, device=CPU)
        examples = load_training_examples(iteration)
        metrics = step_metrics(Scorer(model, getattr(torch, dtype)), recipe.method, examples[:16], 256)
        with pytest.raises(RunError, match="the policy must equal its opponent"):
            check_policy_equals_opponent(recipe.method, metrics, dtype, scoring_noise(iteration))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"train": {"gradient_checkpointing": True}}, {"adapter": {"r": 4}}])
def test_the_policy_is_in_evaluation_mode(
    settings: dict[str, object], make_recipe: MakeRecipe, played: Callable[[str], Any]
) -> None:
    """Except where transformers reads that a layer is to be checkpointed: the decoder layers and what holds them."""
    model = load_policy(Iteration(played("spin").run, make_recipe("spin", **settings), 1), SingleProcess()).model
    modes = {type(module).__name__ for module in model.modules() if module.training}
    assert modes == ({"LlamaModel", "LlamaDecoderLayer"} if "train" in settings else set())
    assert model.is_gradient_checkpointing == ("train" in settings)
