"""Text metrics, the game's metrics, and the evaluate stage against a recomputation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparring.data.tables import read_table
from sparring.loop import play
from sparring.model.load import load_model
from sparring.model.logprobs import Scorer, score_groups
from sparring.objectives import Space, Spin, Tspin
from sparring.objectives.metrics import quadrants, self_play_metrics
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.stages.evaluate.held_out import accuracy
from sparring.stages.evaluate.text_metrics import distinct, repetition, text_metrics
from sparring.types import Generation, Group, Rendered

MakeRecipe = Callable[..., Recipe]


def test_accuracy_leaves_out_what_cannot_be_checked() -> None:
    rows = [Rendered(str(n), n, ids(1), ids(1), "stop", "", "", prompt_key=str(n)) for n in range(5)]
    found = accuracy("greedy", rows, [1.0, 0.0, None, 1.0, None])
    of_three = accuracy("greedy", rows[:3], [1.0, 0.0, 1.0])
    assert found["greedy_accuracy"] == pytest.approx(2 / 3) and found == of_three


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def test_text_metrics_by_hand() -> None:
    assert distinct([ids(1, 2, 1, 2), ids(1, 2)], 1) == pytest.approx(2 / 6)
    assert distinct([ids(1, 2, 1, 2), ids(1, 2)], 2) == pytest.approx(2 / 4)
    assert distinct([ids(1)], 2) == 1.0
    assert repetition(ids(1, 1, 1, 1, 1, 1)) == pytest.approx(2 / 3)
    assert repetition(ids(1, 2, 3)) == 0.0
    answers = [Generation("a", 0, ids(5, 6, 3), "stop"), Generation("b", 0, ids(7, 8, 9, 9), "length")]
    found = text_metrics(answers, [ids(5, 6, 3), ids(7, 3)])
    assert found["length"] == 3.5 and found["length_ratio"] == pytest.approx(3.5 / 2.5)
    assert found["end_rate"] == 0.5 and found["copy_rate"] == 0.5
    assert found["distinct_1"] == pytest.approx(5 / 6), "the end token is not counted, a repeated 9 is"


def test_game_metrics_by_hand() -> None:
    policy = {"real": torch.tensor([-9.0, -9.0, -9.0]), "generated": torch.tensor([[-10.0], [-8.0], [-9.0]])}
    opponent = {"real": torch.tensor([-11.0, -11.0, -11.0]), "generated": torch.tensor([[-10.0], [-10.5], [-11.0]])}
    lengths = {"real": torch.tensor([3, 3, 3]), "generated": torch.tensor([[2], [4], [3]])}
    found = self_play_metrics(Spin(lambda_=0.1), policy, opponent, lengths)
    assert found["rewards/real"].tolist() == pytest.approx([0.2, 0.2, 0.2])
    assert found["rewards/generated"].tolist() == pytest.approx([0.0, 0.25, 0.2])
    assert found["rewards/margins"].tolist() == pytest.approx([0.2, -0.05, 0.0])
    assert found["rewards/accuracies"].tolist() == [1, 0, 0], "a tie is no win"
    assert found["rewards/ties"].tolist() == [0, 0, 1]
    assert found["mean_logps/generated"].tolist() == [-5, -2, -3]
    assert found["alignment"].tolist() == [1, 1, 1]
    tspin = self_play_metrics(
        Tspin(), {**policy, "proto": torch.tensor([-12.0] * 3)}, {}, {**lengths, "proto": lengths["real"]}
    )
    assert tspin["rewards/margins"].tolist() == [1, -1, 0], "T-SPIN's reward is the likelihood"
    assert tspin["advantages/history"].tolist() == [2, 4, 3]
    assert tspin["alignment"].tolist() == [1, 1, 1]


def test_quadrants_by_hand() -> None:
    margin = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    gap = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    found = quadrants(margin, gap)
    assert list(found.values()) == pytest.approx([0.2] * 5)
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def recipe_and_run(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory):
    recipe = make_recipe({"name": "spin", "lambda": 0.5}, data={"held_out": 20}, train={"learning_rate": 3e-3})
    return recipe, play(recipe, tmp_path_factory.mktemp("evaluate") / "run").run


@pytest.mark.slow
def test_metrics_equal_a_recomputation(recipe_and_run) -> None:
    """Every number of the last evaluation again, from the models on disk and the answers of the one before."""
    recipe, run = recipe_and_run
    iteration = Iteration(run, recipe.at(1), 1)
    rows = iteration.held_out_rows()
    metrics = json.loads((iteration.stage("evaluate") / "metrics.json").read_text())
    before = read_table(run.stage(0, "evaluate") / "answers.parquet").to_pylist()
    start = read_table(run.start / "evaluate" / "answers.parquet").to_pylist()

    def score(model: Path, answers: list[dict[str, object]]) -> tuple[np.ndarray, np.ndarray]:
        scorer = Scorer(load_model(model, dtype=torch.float32, device=torch.device("cpu")))
        groups = [
            Group(r.id, r.prompt_ids, {"real": (r.real_ids,), "generated": (ids(*a["token_ids"]),)})  # type: ignore[misc]
            for r, a in zip(rows, answers, strict=True)
        ]
        scores = score_groups(scorer, groups, 512, SingleProcess())
        return scores["real"], scores["generated"][:, 0]

    real, generated = score(run.model(1), before)
    opponent_real, opponent_generated = score(run.model(0), before)
    margin = 0.5 * ((real - opponent_real) - (generated - opponent_generated))
    assert metrics["held_out_nll"] == pytest.approx(-real.sum() / sum(len(r.real_ids) for r in rows), rel=1e-5)
    assert metrics["rewards/real"] == pytest.approx(0.5 * (real - opponent_real).mean(), abs=1e-4)
    assert metrics["rewards/margins"] == pytest.approx(margin.mean(), abs=1e-4)
    assert metrics["rewards/accuracies"] == pytest.approx((margin > 0).mean(), abs=1e-6)
    assert metrics["kl_from_opponent"] == pytest.approx((opponent_generated - generated).mean(), abs=1e-4)
    _, proto = score(run.model(1), start)
    _, proto_start = score(iteration.before().before().policy, start)
    assert metrics["kl_from_start"] == pytest.approx((proto_start - proto).mean(), abs=1e-4)
    assert metrics["advantages/history_logps"] == pytest.approx((generated - proto).mean(), abs=1e-4)
    shares = [metrics[name] for name in metrics if name.startswith("quadrants/")]
    assert len(shares) == 5 and sum(shares) == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
def test_at_iteration_zero_the_opponent_s_answers_are_the_proto_answers(recipe_and_run) -> None:
    _, run = recipe_and_run
    metrics = json.loads((run.stage(0, "evaluate") / "metrics.json").read_text())
    assert metrics["advantages/history"] == 0
    assert metrics["kl_from_start"] == pytest.approx(metrics["kl_from_opponent"])


@pytest.mark.slow
def test_answers_are_kept_with_what_was_found(recipe_and_run) -> None:
    recipe, run = recipe_and_run
    rows = Iteration(run, recipe, 0).held_out_rows()
    for folder in (run.start, run.iteration(0), run.iteration(1)):
        answers = read_table(folder / "evaluate" / "answers.parquet").to_pylist()
        assert [a["id"] for a in answers] == [row.id for row in rows]
        metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())
        assert metrics["sampled_accuracy"] == pytest.approx(np.mean([a["correctness"] for a in answers]))
        assert metrics["greedy_accuracy"] == pytest.approx(np.mean([a["greedy_correctness"] for a in answers]))
        assert all(a["greedy_text"] is not None for a in answers)


@pytest.mark.slow
def test_without_held_out_rows_nothing_is_evaluated(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = play(make_recipe("space", iterations=1, data={"held_out": 0}), tmp_path / "run").run
    assert run.model(0).is_dir()
    assert not list(run.root.rglob("evaluate"))
    assert run.report.is_file()


@pytest.mark.slow
def test_tspin_history_in_evaluation_uses_the_first_answers(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = play(make_recipe("tspin", iterations=2, train={"epochs": 1}), tmp_path / "run").run
    metrics = json.loads((run.stage(1, "evaluate") / "metrics.json").read_text())
    assert metrics["advantages/history"] == pytest.approx(metrics["advantages/history_logps"], abs=1e-4)
    assert metrics["alignment"] == pytest.approx(1.0), "T-SPIN's reward orders as its likelihood does"


def test_space_reward_is_the_log_ratio() -> None:
    one, lengths = torch.tensor([-3.0]), torch.tensor([4])
    assert Space(mu=7.0).reward(one, one - 2, lengths).item() == 2
