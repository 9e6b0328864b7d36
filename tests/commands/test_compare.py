"""`sparring compare`: what the arms share, what it refuses, and its statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from html_checks import assert_inert

from sparring.commands.compare import compare, copy_rows, parse_method
from sparring.data.tables import read_rendered
from sparring.errors import RunMismatch, UserError
from sparring.loop import play
from sparring.objectives import Space, Spin, Tspin
from sparring.recipe.schema import Recipe
from sparring.report.comparison import Comparison, over_seeds, write_comparison
from sparring.run.iteration import Iteration
from sparring.run.manifest import is_committed
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings

MakeRecipe = Callable[..., Recipe]
METHODS = ["spin:lambda=1", "space"]


@pytest.fixture(scope="module")
def compared(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Comparison]:
    recipe = Recipe.model_validate(
        {
            "model": str(tiny / "model"),
            "method": {"name": "space", "mu": 3.0},
            "iterations": 1,
            "data": {"train": str(tiny / "rows.jsonl"), "held_out": 12},
            "generate": {"max_new_tokens": 8},
            "train": {"learning_rate": 1e-3, "batch_size": 16, "epochs": 1, "dtype": "float32"},
            "evaluate": {"checker": "number"},
            "threads": 1,
        }
    )
    root = tmp_path_factory.mktemp("compare") / "all"
    return recipe, compare(recipe, root, METHODS, seeds=2)


def times(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*.parquet")}


def test_arms_share_rows_split_start_and_first_responses(compared: tuple[Recipe, Comparison]) -> None:
    _, comparison = compared
    assert [(arm.label, arm.seed) for arm in comparison.arms] == [(m, seed) for seed in (0, 1) for m in METHODS]
    assert len({arm.run.digest(arm.run.data) for arm in comparison.arms}) == 1
    for seed in (0, 1):
        spin, space = (arm.run for arm in comparison.arms if arm.seed == seed)
        for path in ("start/evaluate", "iter-00/generate", "iter-00/score"):
            first, second = (run.root / path / "MANIFEST.json" for run in (spin, space))
            assert first.read_bytes() == second.read_bytes(), "computed once: even the seconds are equal"
    first, second = (arm.run for arm in comparison.arms if arm.label == "space")
    assert first.digest(first.stage(0, "generate")) != second.digest(second.stage(0, "generate"))


def test_a_reused_stage_equals_the_arm_s_own(compared: tuple[Recipe, Comparison], tmp_path: Path) -> None:
    _, comparison = compared
    arm = next(arm for arm in comparison.arms if arm.label == "space")
    alone = RunDir(tmp_path)
    check_settings(alone, arm.results.recipe)
    copy_rows(RunDir(comparison.root), alone, arm.share, arm.results.recipe.seed)
    play(arm.results.recipe, alone.root)
    for stage in ("generate", "score", "evaluate"):
        assert alone.digest(alone.stage(0, stage)) == arm.run.digest(arm.run.stage(0, stage))
    assert alone.digest(alone.model(0)) == arm.run.digest(arm.run.model(0))


def test_methods_have_their_own_coefficients(compared: tuple[Recipe, Comparison]) -> None:
    recipe, _ = compared
    assert parse_method("space").recipe(recipe, 0).method == Space(mu=3.0), "the recipe's own"
    assert parse_method("spin:lambda=1:rounds=1").recipe(recipe, 0).method == Spin(lambda_=1.0, rounds=1)
    tspin = parse_method("tspin:train.learning_rate=1e-4").recipe(recipe, 7)
    assert [tspin.at(0).method, tspin.at(1).method] == [Tspin(beta=0.0), Tspin()]
    assert (tspin.train.learning_rate, tspin.seed) == (1e-4, 7)


def test_the_same_call_does_nothing_and_a_larger_one_adds(compared: tuple[Recipe, Comparison]) -> None:
    recipe, comparison = compared
    before = times(comparison.root)
    compare(recipe, comparison.root, METHODS, seeds=2)
    assert times(comparison.root) == before
    more = compare(recipe, comparison.root, ["sft", "space"], seeds=1, fractions=(0.5, 1.0))
    assert [(arm.label, arm.share) for arm in more.arms] == [(m, s) for s in (1.0, 0.5) for m in ("sft", "space")]
    assert before.items() <= times(comparison.root).items()
    rows = {arm.share: {row.id for row in read_rendered(arm.run.data / "train.parquet")} for arm in more.arms}
    assert rows[0.5] < rows[1.0] and [len(rows[share]) for share in (0.5, 1.0)] == [24, 48]
    numbers = json.loads((comparison.root / "comparison.json").read_text())
    assert (numbers["control"], numbers["seeds"]) == ("sft", 1)
    few = next(arm for arm in numbers["arms"] if (arm["method"], arm["share"]) == ("space", 0.5))
    assert few["budget"]["annotations"] == 24
    against = few["to_control_on_all_rows"]["held_out_nll"]["mean"]
    sft = next(arm for arm in numbers["arms"] if (arm["method"], arm["share"]) == ("sft", 1.0))
    assert against == pytest.approx(few["chosen"]["held_out_nll"]["mean"] - sft["chosen"]["held_out_nll"]["mean"])
    html = (comparison.root / "report.html").read_text()
    assert "Fewer annotated rows, compared to sft" in html and "One seed cannot separate" in html


def test_the_numbers_equal_those_of_the_runs(compared: tuple[Recipe, Comparison]) -> None:
    _, comparison = compared
    write_comparison(comparison)
    numbers = json.loads((comparison.root / "comparison.json").read_text())
    assert (numbers["control"], numbers["seeds"], numbers["held_out_rows"]) == (METHODS[0], 2, 12)
    assert [arm["method"] for arm in numbers["arms"]] == METHODS
    for arm in numbers["arms"]:
        runs = [Results(one.run.root) for one in comparison.select(arm["method"], 1.0)]
        for metric in ("held_out_nll", "greedy_accuracy", "sampled_accuracy"):
            for point in arm["curves"][metric]:
                expected = [run.evaluations()[point["iteration"]][metric] for run in runs]
                assert point["seeds"] == pytest.approx(expected, abs=1e-6)
        steps = [line["num_tokens"] for run in runs for line in run.training(0)]
        assert arm["budget"] | {"seconds": 0} == {
            "annotations": 48,
            "optimizer_tokens": sum(steps) / 2,
            "seconds": 0,
        }
        difference = arm["to_control"]["last"]["held_out_nll"]
        low, high = difference["rows_95"]
        assert low <= difference["mean"] <= high
        assert (difference["mean"] == 0) == (arm["method"] == METHODS[0])
        assert sum(arm["quadrants"].values()) == pytest.approx(1, abs=1e-6)
    html = (comparison.root / "report.html").read_text()
    assert "over held-out prompts, paired by row" in html and "spin:lambda=1" in html
    assert_inert(html)
    assert html.count('data-source="spin:lambda=1"') > 5, "responses side by side"


def test_an_iteration_is_chosen_and_evaluated_on_different_rows(compared: tuple[Recipe, Comparison]) -> None:
    _, comparison = compared
    arm = comparison.select("space", 1.0)[0]
    assert comparison.choosing.sum() == comparison.judging.sum() == 6
    chances = [arm.results.value("held_out_nll", t, comparison.choosing).mean for t in (-1, 0)]
    assert comparison.choose_iteration(arm) == int(np.argmin(chances)) - 1
    chosen = comparison.at_chosen("space", 1.0, "held_out_nll")
    expected = arm.results.value("held_out_nll", comparison.choose_iteration(arm), comparison.judging)
    assert chosen["seeds"][0] == pytest.approx(expected.mean)  # type: ignore[index]


def test_intervals() -> None:
    interval = over_seeds([1.0, 2.0, 3.0])
    assert interval["mean"] == 2.0
    assert interval["half_width_95"] == pytest.approx(4.302653 / math.sqrt(3), abs=1e-6)
    assert over_seeds([1.0])["half_width_95"] is None, "tests/run/test_estimate.py tests their coverage"


def test_refusals(compared: tuple[Recipe, Comparison], make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe, comparison = compared
    for labels, message in (
        (["spni"], "unknown method 'spni'"),
        (["spin:data.limit=3"], "cannot be set per method"),
        (["spin:train.max_length=64"], "cannot be set per method"),
        (["spin:lambda"], "cannot be set per method"),
        (["spin:lambda=-1"], "greater than 0"),
        (["spin:mu=1"], "no setting 'method.mu' of spin"),
        (["sft", "sft"], "--methods must differ"),
    ):
        with pytest.raises(UserError, match=message):
            compare(recipe, tmp_path / "none", labels)
    assert not (tmp_path / "none").exists(), "nothing is written before the settings are checked"
    changed = recipe.model_copy(update={"iterations": 1, "seed": 5})
    with pytest.raises(RunMismatch, match="seed is 5"):
        compare(changed, comparison.root, METHODS)
    phases = {"data": {"self_play_rows": 0.5}, "per_iteration": {0: {"method": "sft"}}}
    with pytest.raises(UserError, match=r"data.self_play_rows: a comparison has no sft phase"):
        compare(make_recipe("space", **phases), tmp_path / "none", METHODS)
    with pytest.raises(UserError, match=r"data.held_out: a comparison needs held-out rows"):
        compare(make_recipe(data={"held_out": 0}), tmp_path / "zero", METHODS)


def test_runs_with_different_evaluations_are_refused(
    compared: tuple[Recipe, Comparison], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    recipe, comparison = compared
    other = RunDir(tmp_path / "other")
    play(recipe.model_copy(update={"seed": 9}), other.root)  # another split
    assert is_committed(Iteration(other, recipe, 0).stage("evaluate"))
    arm = comparison.arms[0]
    foreign = type(arm)("space", 0, 1.0, other)
    with pytest.raises(UserError, match="the set of held-out rows differs"):
        Comparison(comparison.root, recipe, [arm, foreign])
