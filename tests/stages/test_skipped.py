"""Work that cannot matter is not done, and leaving it out changes no gradient."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from shortcuts import step_metrics

from sparring.loop import play
from sparring.model.load import load_model
from sparring.model.logprobs import Scorer
from sparring.model.packing import Packing, distinct_responses
from sparring.objectives import Space, Spin, Tspin
from sparring.recipe.schema import Recipe
from sparring.run.examples import generated_inputs, load_training_examples
from sparring.run.iteration import Iteration
from sparring.run.manifest import read_manifest
from sparring.types import Group, Objective, Role, TrainingExample

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
PROMPT, REAL, OTHER = (np.arange(first, first + count, dtype=np.int32) for first, count in ((4, 7), (9, 5), (20, 6)))

GAMES = {"spin": Spin(), "tspin": Tspin(), "tspin without history": Tspin(beta=0.0), "space": Space()}
# (real, generated, proto)
ANSWERS = {
    "generated is real": (REAL, REAL, OTHER),
    "generated is proto": (REAL, OTHER, OTHER),
    "all are one": (REAL, REAL, REAL),
}


def one_example(objective: Objective, answers: str) -> TrainingExample:
    """With log-probs of the opponent that are near those of the tiny model, so that no gradient vanishes by chance."""
    every: dict[Role, np.ndarray] = dict(zip(("real", "generated", "proto"), ANSWERS[answers], strict=True))
    needs = objective.needs
    opponent = {role: np.float32(-3.5 * len(every[role])) for role in needs.roles} if needs.opponent else {}
    return TrainingExample(
        Group("0", PROMPT, {role: (every[role],) for role in needs.roles}),
        {role: np.array([value] if role == "generated" else value) for role, value in opponent.items()},
    )


def gradient(
    tiny: Path, objective: Objective, one: TrainingExample, packing: Packing
) -> tuple[torch.Tensor, dict[str, float]]:
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    metrics = step_metrics(Scorer(model, packing=packing), objective, [one], 10_000)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), metrics


@pytest.mark.parametrize("answers", ANSWERS)
@pytest.mark.parametrize("game", GAMES)
def test_equal_answers_are_computed_once(game: str, answers: str, tiny: Path) -> None:
    """Against padded rows, where every answer is computed for itself; and the tokens that the model reads are counted.

    SPIN's gradient vanishes where the generated answer is the real one. Of T-SPIN's the current term does, the
    historical one does not unless the proto answer is the same. SPACE's does only where policy and opponent agree.
    """
    objective = GAMES[game]
    one = one_example(objective, answers)
    shared, metrics = gradient(tiny, objective, one, "shared")
    alone, unskipped = gradient(tiny, objective, one, "padded")
    torch.testing.assert_close(shared, alone, atol=1e-6, rtol=1e-4)
    assert metrics["loss"] == pytest.approx(unskipped["loss"], rel=1e-6)
    every = [response for responses in one.group.responses.values() for response in responses]
    distinct = {tuple(response.tolist()) for response in every}
    assert metrics["num_tokens"] == len(PROMPT) + sum(map(len, distinct))
    assert unskipped["num_tokens"] == sum(len(PROMPT) + len(response) for response in every)
    vanishes = {
        "spin": answers != "generated is proto",
        "tspin": answers == "all are one",
        "tspin without history": answers != "generated is proto",
        "space": False,
    }[game]
    assert (float(shared.norm()) < 1e-5) == vanishes
    if game == "tspin" and answers == "generated is real":
        history, _ = gradient(tiny, Tspin(alpha=1.0, beta=1.0), one, "padded")
        torch.testing.assert_close(shared, objective.beta * history, atol=1e-6, rtol=1e-3)  # type: ignore[attr-defined]


def test_an_sft_term_keeps_a_pair_that_the_game_would_not_need(tiny: Path) -> None:
    """So pairs of equal answers stay in the step: their tokens are a prompt and one answer."""
    one = one_example(Spin(), "generated is real")
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    step_metrics(Scorer(model), Spin(), [one], 10_000, 1.0)
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) > 1e-3


def expected_tokens(examples: list[TrainingExample]) -> int:
    """Of one epoch: every prompt once, and the answers to it that differ."""
    return sum(len(one.group.prompt_ids) + sum(map(len, distinct_responses(one.group)[0])) for one in examples)


@pytest.mark.slow
def test_a_term_of_weight_0_is_neither_read_nor_computed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """T-SPIN with beta 0 and without, in an iteration that has proto answers: read, and counted in tokens."""
    phases = {0: {"method.beta": 0.0}, 1: {"method.beta": 0.0}}
    recipe = make_recipe(
        "tspin", iterations=3, per_iteration=phases, train={"epochs": 1}, data={"held_out": 0, "limit": 48}
    )
    run = play(recipe, tmp_path / "run").run
    for index in range(3):
        iteration = Iteration(run, recipe.at(index), index)
        examples = load_training_examples(iteration)
        has_proto = index == 2
        assert ("proto" in examples[0].group.responses) == has_proto
        assert (run.stage(0, "generate") in generated_inputs(iteration)) == (has_proto or index == 0)
        lines = (run.stage(index, "train") / "metrics.jsonl").read_text().splitlines()
        assert sum(json.loads(line)["num_tokens"] for line in lines) == expected_tokens(examples)
        assert not run.stage(index, "score").exists(), "no reference, so nothing is scored"
        drawn = read_manifest(run.stage(index, "generate")).info
        assert drawn["answers"] == len(examples), "each iteration draws its own answers once, and no proto answers"


@pytest.mark.slow
def test_answers_that_an_earlier_iteration_holds_are_not_drawn_again(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """SPIN's older round is read from disk: twice as many pairs, as many answers drawn."""
    recipe = make_recipe("spin", train={"epochs": 1}, data={"held_out": 0, "limit": 48})
    run = play(recipe, tmp_path / "run").run
    counts = [
        (
            len(load_training_examples(Iteration(run, recipe, t))),
            read_manifest(run.stage(t, "generate")).info["answers"],
        )
        for t in range(2)
    ]
    assert counts == [(48, 48), (2 * 48, 48)]
