"""The engine's log-probs beside the scorer's: silent where they agree, said where another model has drawn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparring.data.tables import read_scores
from sparring.loop import run_stage
from sparring.model.load import load_model
from sparring.model.logprobs import Scorer, score_groups
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.report.summary import scoring_noise
from sparring.report.warnings import find_warnings
from sparring.run.examples import JoinedRow, load_training_examples, read_iteration
from sparring.run.iteration import Iteration
from sparring.run.manifest import read_manifest
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.run.schedule import Schedule
from sparring.run.session import check_settings
from sparring.stages.prepare import prepare
from sparring.stages.score import ENGINE_TOLERANCE, NUM_RESCORED, engine_difference
from sparring.types import Generation, Group, Rendered


@pytest.mark.slow
def test_the_rounding_of_cached_log_probs_is_measured_and_said(played: Callable[[str], Any]) -> None:
    """Against log-probs of the same responses, each computed alone."""
    recipe, run = played("space")
    info = read_manifest(run.stage(2, "score")).info
    iteration = Iteration(run, recipe.at(2), 2)
    examples = load_training_examples(iteration)
    first = Schedule(recipe.train, len(examples), iteration.seed).batch(examples, 0)[:NUM_RESCORED]
    scorer = Scorer(load_model(iteration.opponent, dtype=torch.float32, device=torch.device("cpu")))
    differences, lengths = [], []
    for example in first:
        for role, responses in example.group.responses.items():
            for response, cached in zip(responses, np.atleast_1d(example.opponent[role]), strict=True):
                alone = Group("", example.group.prompt_ids, {"real": (response,)})
                logprob = score_groups(scorer, [alone], 1, SingleProcess())["real"][0]
                differences.append(abs(logprob - cached))
                lengths.append(len(response))
    assert info["noise_responses"] == len(differences) == 2 * NUM_RESCORED
    assert info["noise_per_response"] == pytest.approx(np.mean(differences), abs=2e-6)
    assert info["noise_per_token"] == pytest.approx(np.mean(np.array(differences) / lengths), abs=2e-7)
    assert 0 < info["noise_per_token"] < 1e-5, "float32"
    assert f"rounding of {info['noise_per_response']:.2g} nats per response" in scoring_noise(Results(run.root))


@pytest.mark.slow
@pytest.mark.parametrize(("shift", "is_wrong"), [(0.9, False), (1.1, True), (-1.1, True), (float("nan"), True)])
def test_an_engine_with_another_model_is_told(
    shift: float,
    is_wrong: bool,
    make_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The column of log-probs is made from the scorer's own, each `shift` times the tolerance per token away."""
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    recipe = make_recipe("spin", iterations=1)
    check_settings(run, recipe)
    prepare(run, recipe)
    iteration = Iteration(run, recipe, 0)
    for stage in ("generate", "score"):
        run_stage(iteration, stage)
    assert "engine_difference" not in read_manifest(run.stage(0, "score")).info, "hf reports none"
    scored = read_scores(run.stage(0, "score") / "opponent.parquet")
    shutil.rmtree(run.stage(0, "score"))
    drawn, by = read_iteration(iteration, 0), shift * ENGINE_TOLERANCE["float32"]

    def reported(answer: Generation) -> Generation:
        return replace(answer, logprob=scored[answer.id, "generated", 0, answer.sample] + by * len(answer.token_ids))

    doctored = [reported(answer) if place < 5 else answer for place, answer in enumerate(drawn)]
    monkeypatch.setattr("sparring.run.examples.read_iteration", lambda iteration, index: doctored)
    capsys.readouterr()
    run_stage(iteration, "score")
    info = read_manifest(run.stage(0, "score")).info
    assert info["engine_answers"] == 5
    assert info["engine_difference"] == pytest.approx(abs(by), rel=0.05, nan_ok=True)
    said = " ".join(capsys.readouterr().err.split())
    assert ("The engine serves another model than the one that is scored" in said) == is_wrong
    told = [
        text for text in find_warnings(Results(run.root)) if "samples from a different model in iteration 0" in text
    ]
    assert len(told) == is_wrong


def test_only_answers_with_a_log_prob_count() -> None:
    tokens = np.array([5, 6, 7, 8], dtype=np.int32)
    answers = [
        [Generation("a", 0, tokens, "stop", -8.0), Generation("a", 1, tokens[:2], "stop", None)],
        [Generation("b", 0, tokens[:0], "failed", None), Generation("b", 1, tokens[:2], "length", -3.0)],
    ]
    row = Rendered("a", 1, tokens, tokens, "stop", "", "")
    joined = [JoinedRow(row, {3: tuple(drawn)}) for drawn in answers]
    found = engine_difference(joined, 3, np.array([[-6.0, -1.0], [0.0, -4.0]], dtype=np.float32), "bfloat16")
    assert found == {"engine_difference": 0.5, "engine_allowed": 1 / 16, "engine_answers": 2}
