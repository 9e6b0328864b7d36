"""`sparring tune`: what it plays, that it continues, and when it returns another method than SFT."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_checks import assert_inert
from transformers import AutoModelForCausalLM

import sparring.commands.tune
from sparring.commands.tune import Space, Trials, open_study, parse_budget, rate_range, search, tune
from sparring.errors import UserError
from sparring.recipe.load import load_recipe
from sparring.recipe.schema import Recipe
from sparring.report.tuning import Played, Tuning
from sparring.run.estimate import Estimate
from sparring.run.results import Results

pytest.importorskip("optuna")

MakeRecipe = Callable[..., Recipe]
SPACE = Space(("sft", "spin"), 1e-5, 1e-3)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(make_recipe: MakeRecipe) -> Recipe:
    """Its answers are long enough to be right, and too short to take long."""
    return make_recipe("sft", data={"limit": 24}, generate={"max_new_tokens": 8}, train={"epochs": 1}, threads=1)


class Clock:
    """Plays a trial of the real runs and says how long it took: ten seconds per iteration."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.played: list[tuple[str, int]] = []
        self.dies_at = 0
        real = Trials.play

        def play(trials: Trials, label: str, index: int) -> tuple[float | None, float]:
            self.played.append((label, index))
            if len(self.played) == self.dies_at:
                raise KeyboardInterrupt
            return real(trials, label, index)[0], 10.0

        monkeypatch.setattr(Trials, "play", play)


def test_a_killed_tuning_continues_and_returns_what_it_judged(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    clock.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        tune(recipe, tmp_path / "tuning", "50s", methods=("sft", "space"))
    clock.dies_at = 0
    tuning = tune(recipe, tmp_path / "tuning", "50s", methods=("sft", "space"))
    labels = [label for label, _ in clock.played]
    assert labels[:2] == [labels[0]] * 2 and labels[2] == labels[3] and labels[0].startswith("sft:")
    assert clock.played[2] == clock.played[3], "the trial that was killed is played on, not another one"
    assert tuning.seconds == 50.0 and 2 <= len(tuning.trials) <= 4

    again = tune(recipe, tmp_path / "tuning", "70s", methods=("sft", "space"))
    assert again.seconds == 70.0 and len(again.trials) > len(tuning.trials), "a larger budget adds trials"
    numbers = json.loads((tmp_path / "tuning" / "tune.json").read_text())
    assert numbers["returned"] == again.returned.label and len(numbers["trials"]) == len(again.trials)
    best = load_recipe(tmp_path / "tuning" / "best.yaml")
    assert best.train.learning_rate == pytest.approx(again.returned.rate) and best.iterations >= 1
    if again.returned.iteration >= 0:
        AutoModelForCausalLM.from_pretrained(tmp_path / "tuning" / "model")
    html = (tmp_path / "tuning" / "report.html").read_text()
    assert_inert(html)
    assert all(one.label in html for one in again.trials)

    first, second = (one.results.run for one in again.trials[:2])
    assert first.digest(first.data) == second.digest(second.data), "one set of rows"
    starts = {(one.results.run.start / "evaluate" / "MANIFEST.json").read_bytes() for one in again.trials}
    assert len(starts) == 1, "the start is evaluated once"


@pytest.mark.parametrize(
    ("metric", "low", "high", "expected"),
    [
        ("held_out_nll", -0.3, -0.1, "spin"),
        ("held_out_nll", -0.3, 0.1, "sft"),
        ("held_out_nll", 0.1, 0.3, "sft"),
        ("greedy_accuracy", 0.1, 0.3, "spin"),
        ("greedy_accuracy", -0.3, -0.1, "sft"),
    ],
)
def test_another_method_is_returned_only_if_its_interval_says_so(
    played: Callable[[str], Any],
    metric: str,
    low: float,
    high: float,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its value on the prompts that chose it does not matter: they flatter what they choose."""
    monkeypatch.setattr(Tuning, "judged", Estimate((low + high) / 2, low, high, 50))
    recipe, run = played("spin")
    evaluate = recipe.evaluate.model_copy(update={"save_best_by": metric})
    trials = [Played(f"{name}:train.learning_rate=1e-4", 3, 0.5, Results(run.root)) for name in ("sft", "spin")]
    tuning = Tuning(Path(), recipe.model_copy(update={"evaluate": evaluate}), trials, (1e-5, 1e-3), 1.0)
    assert tuning.returned.method == expected
    assert tuning.verdict.startswith("spin" if expected == "spin" else "No other method is better than tuned SFT")


def test_the_first_trials_are_the_same_for_every_method() -> None:
    played: list[str] = []

    def play(label: str, index: int) -> tuple[float, float]:
        played.append(label)
        return 1.0, 1.0

    search(open_study(None, True, 1, 0), SPACE, 1, play, 6.0)
    rates = [(label.partition(":")[0], label.rpartition("=")[2]) for label in played]
    assert rates == [(m, rate) for rate in ("0.0001", "3.16e-05", "0.000316") for m in ("sft", "spin")]
    assert all("lambda=0.1" in label for label in played if label.startswith("spin")), "the paper's"


def test_a_trial_that_is_behind_ends_early_and_the_budget_holds() -> None:
    played: list[tuple[str, int]] = []

    def play(label: str, index: int) -> tuple[float, float]:
        played.append((label, index))
        return (1.0 if label.startswith("sft") else 2.0) - index / 10, 5.0

    study = open_study(None, True, 4, 0)
    search(study, SPACE, 4, play, 200.0)
    depth = {method: max(index for label, index in played if label.startswith(method)) for method in SPACE.methods}
    assert depth["sft"] == 3
    spin = [index for label, index in played if label.startswith("spin")]
    assert spin.count(0) > spin.count(3), "most trials of the worse method end before their last iteration"
    assert 190 <= 5 * len(played) <= 200


def test_one_trial_of_sft_is_played_whatever_the_budget() -> None:
    played: list[str] = []

    def play(label: str, index: int) -> tuple[float, float]:
        played.append(label)
        return 1.0, 100.0

    search(open_study(None, True, 3, 0), SPACE, 3, play, 1.0)
    assert len(played) == 1 and played[0].startswith("sft")


def test_a_method_that_cannot_play_ends_its_trial_only(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """rft on a model that answers nothing right yet. Its seconds count."""
    clock = Clock(monkeypatch)
    tuning = tune(recipe, tmp_path / "tuning", "50s", methods=("rft", "sft"))
    played = [label.partition(":")[0] for label, _ in clock.played]
    assert played[0] == "sft" and "rft" in played and played[-1] == "sft" and len(played) == 5
    assert "ends here: evaluate.checker accepts none" in capfd.readouterr().err
    assert {one.method for one in tuning.trials} == {"sft"} and "No other method was tried" in tuning.verdict
    with pytest.raises(UserError, match=r"was started with sft,rft\. Use these"):
        tune(recipe, tmp_path / "tuning", "50s", methods=("sft", "space"))


def test_a_continued_search_does_not_repeat_itself(tmp_path: Path) -> None:
    played: list[str] = []

    def play(label: str, index: int) -> tuple[float, float]:
        played.append(label)
        return 1.0, 1.0

    for budget in (9.0, 12.0):
        search(open_study(tmp_path / "log", True, 1, 0), SPACE, 1, play, budget)
    assert len(played) == len(set(played)) == 12


def test_the_range_of_rates_follows_the_model() -> None:
    for size, usual in ((135e6, 1e-4), (7e9, 2e-5), (7e9, 5e-7 * 1.3)):
        low, high = rate_range(int(size), is_adapter=False)
        assert low <= usual <= high
    assert rate_range(10**9, is_adapter=True)[0] == pytest.approx(10 * rate_range(10**9, is_adapter=False)[0])
    ranges = [rate_range(int(size), is_adapter=False) for size in (1e5, 1e8, 1e9, 1e11)]
    assert ranges == sorted(ranges, reverse=True)


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("0.5h", 1800)]
)
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "2 hours", "-1h", "1m1h"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UserError, match="write hours, minutes or seconds"):
        parse_budget(text)


def test_what_cannot_be_is_refused(
    recipe: Recipe, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="sft must be among them"):
        tune(recipe, tmp_path / "a", "1m", methods=("spin",))
    with pytest.raises(UserError, match="tune chooses the settings itself"):
        tune(recipe, tmp_path / "a", "1m", methods=("sft", "spin:lambda=1"))
    with pytest.raises(UserError, match=r"data\.held_out: tune chooses on one half"):
        tune(make_recipe("sft", data={"held_out": 0}, evaluate={"checker": None}), tmp_path / "b", "1m")
    monkeypatch.setattr(sparring.commands.tune, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sparring\[tune\]'"):
        tune(recipe, tmp_path / "c", "1m")
    assert not (tmp_path / "c").exists()


def test_landscapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/tune_landscapes.py on a few: the rule can return another method. The kept result holds its promise."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = runpy.run_path(str(ROOT / "benchmarks" / "tune_landscapes.py"))
    land = script["Landscape"](0, 0.0)
    model, label = script["Model"], "{}:{}train.learning_rate=1e-05"
    good, bad = model(label.format("space", ""), 3), model(label.format("sft", ""), 0)
    object.__setattr__(land, "true_loss", lambda one: 0.5 if one.label == good.label else 1.0)
    assert land.returned([good, bad]) == (good, bad)
    object.__setattr__(land, "true_loss", lambda one: 1.0)
    assert np.abs(np.mean(land.losses(good) - land.losses(bad))) < 0.05
    kept = json.loads((ROOT / "benchmarks" / "results" / "tune_landscapes.json").read_text())
    assert kept["landscapes"] == 1000
    assert all(kept[kind]["tune"]["worse_than_tuned_sft"] <= 0.025 for kind in ("equal", "different"))
