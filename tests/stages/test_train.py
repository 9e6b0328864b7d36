"""The inner loop: a step is the same with any micro-batches, and what stops training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from shortcuts import generations, step_metrics

import sparring.stages.train.loop
from sparring.data.tables import read_rendered, read_scores
from sparring.errors import RunError
from sparring.loop import play
from sparring.model.load import load_model, load_tokenizer
from sparring.model.logprobs import Scorer
from sparring.objectives import OBJECTIVES, Sft, Space, Spin, Tspin
from sparring.recipe.schema import Recipe, Train
from sparring.run.examples import load_training_examples
from sparring.run.iteration import Iteration
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.run.schedule import learning_rate
from sparring.stages.train.checkpoint import Checkpointer
from sparring.stages.train.step import check_policy_equals_opponent, check_start_loss
from sparring.types import Group, Objective, TrainingExample

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples() -> list[TrainingExample]:
    random = np.random.default_rng(0)

    def tokens() -> np.ndarray:
        return random.integers(4, 40, random.integers(1, 12)).astype(np.int32)

    return [
        TrainingExample(
            Group(str(i), tokens(), {"real": (tokens(),), "generated": (tokens(),), "proto": (tokens(),)}),
            {
                "real": np.array(-30.0 - i, dtype=np.float32),
                "generated": np.array([-28.0], dtype=np.float32),
                "proto": np.array(-29.0, dtype=np.float32),
            },
        )
        for i in range(13)
    ]


@pytest.mark.parametrize("objective", [Spin(), Tspin(), Space(), Sft()], ids=lambda o: o.name)
def test_micro_batches_change_neither_loss_nor_gradient(
    objective: Objective, examples: list[TrainingExample], tiny: Path
) -> None:
    """13 examples of unequal lengths, in one piece, in pieces of other sizes, one by one."""
    results = []
    for micro_batch_tokens in (10_000, 150, 1):
        model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
        metrics = step_metrics(Scorer(model), objective, examples, micro_batch_tokens)
        results.append((metrics, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for metrics, gradient in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-5, abs=1e-5)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-5, rtol=1e-4)


def test_the_loss_of_a_step_is_the_mean_over_its_examples(examples: list[TrainingExample], tiny: Path) -> None:
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    together = step_metrics(Scorer(model), Spin(), examples, 100)["loss"]
    alone = [step_metrics(Scorer(model), Spin(), [one], 100)["loss"] for one in examples]
    assert together == pytest.approx(float(np.mean(alone)), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in OBJECTIVES if name != "rft"])  # of whose answers none is right
def test_step_zero_is_the_published_constant_in_every_iteration(played: Callable[[str], Any], method: str) -> None:
    recipe, run = played(method)
    for t in range(recipe.iterations):
        lines = [json.loads(line) for line in (run.stage(t, "train") / "metrics.jsonl").read_text().splitlines()]
        first = lines[0]
        expected = recipe.at(t).method.start_loss
        if expected is not None:
            assert first["loss"] == pytest.approx(expected, rel=1e-5)
            assert first["rewards/real"] == pytest.approx(0, abs=1e-5)
            assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_tokens", [64, 8192])
def test_the_proof_holds_in_bfloat16_whatever_the_batches(
    make_recipe: MakeRecipe, tmp_path: Path, micro_batch_tokens: int
) -> None:
    recipe = make_recipe(
        "space", iterations=2, train={"dtype": "bfloat16", "micro_batch_tokens": micro_batch_tokens, "epochs": 1}
    )
    run = play(recipe, tmp_path / "run").run
    for t in range(2):
        first = json.loads((run.stage(t, "train") / "metrics.jsonl").read_text().splitlines()[0])
        assert first["loss"] == pytest.approx(2 * math.log(2), abs=2e-2)
        assert first["log_ratio"] < 1e-3


@pytest.mark.slow
def test_which_answers_enter_an_iteration(played: Callable[[str], Any]) -> None:
    """SPIN: iterations t and t-1. T-SPIN: t, and the first one as proto. SPACE: t."""
    counts = {}
    for method in ("spin", "tspin", "space", "sft"):
        recipe, run = played(method)
        for t in range(3):
            iteration = Iteration(run, recipe.at(t), t)
            examples = load_training_examples(iteration)
            counts[method, t] = len(examples)
            rows = {row.id for row in iteration.train_rows()}
            assert {p.group.id for p in examples} == rows
            if method == "tspin":
                assert ("proto" in examples[0].group.responses) == (t > 0)
                for one in examples if t > 0 else []:
                    first = generations(iteration, 0)[one.group.id][0].token_ids
                    assert np.array_equal(one.group.responses["proto"][0], first)
            if method == "spin" and t > 0:
                drawn = [generations(iteration, r) for r in (t, t - 1)]
                halves = [examples[: len(rows)], examples[len(rows) :]]
                for half, answers in zip(halves, drawn, strict=True):
                    for one in half:
                        expected = answers[one.group.id][0].token_ids
                        assert np.array_equal(one.group.responses["generated"][0], expected)
    assert counts == {
        **{("spin", t): 48 * (1 + (t > 0)) for t in range(3)},
        **{(method, t): 48 for method in ("tspin", "space", "sft") for t in range(3)},
    }
    run: RunDir = played("spin").run
    assert not played("tspin").run.stage(0, "score").exists(), "T-SPIN reads no opponent"
    assert not played("sft").run.stage(0, "generate").exists(), "SFT reads no generated answer"
    input_digests = json.loads((run.stage(2, "score") / "MANIFEST.json").read_text())["input_digests"]
    assert set(input_digests) == {"data", "iter-01/train/model", "iter-02/generate", "iter-01/generate"}
    assert input_digests["iter-01/train/model"] == run.digest(run.model(1)), "scores of t name the model of t-1"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spin", "tspin", "space"])
def test_sft_then_a_game_on_rows_that_it_did_not_see(
    method: str, make_recipe: MakeRecipe, tiny: Path, tmp_path: Path
) -> None:
    """data.self_play_rows: sft trains on the other rows. Self-play uses only these; its first answers are the proto."""
    data = {"train": str(tiny / "rows.jsonl"), "held_out": 12, "self_play_rows": 0.25}
    recipe = make_recipe(method, iterations=3, data=data, per_iteration={0: {"method": "sft"}})
    run = play(recipe, tmp_path / "run").run
    rows, kept = ({row.id for row in read_rendered(run.data / f"{name}.parquet")} for name in ("train", "self_play"))
    assert (len(rows), len(kept)) == (36, 12) and not rows & kept
    first, second, third = (Iteration(run, recipe.at(t), t) for t in range(3))
    assert {one.group.id for one in load_training_examples(first)} == rows
    assert not run.stage(0, "generate").exists()
    for iteration in (second, third):
        assert (
            {one.group.id for one in load_training_examples(iteration)}
            == kept
            == set(generations(iteration, iteration.index))
        )
    assert (second.rounds(), third.rounds()) == ([1], [2, 1] if method == "spin" else [2])
    if method == "tspin":
        drawn = generations(second, 1)
        for one in load_training_examples(third):
            assert np.array_equal(one.group.responses["proto"][0], drawn[one.group.id][0].token_ids)
    assert Results(run.root).data.num_train == 48  # type: ignore[union-attr]


def test_an_sft_term_adds_its_gradient_and_leaves_the_loss(examples: list[TrainingExample], tiny: Path) -> None:
    def gradient(objective: Objective, weight: float = 0.0) -> tuple[float, torch.Tensor]:
        model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
        metrics = step_metrics(Scorer(model), objective, examples, 1000, weight)
        return metrics["loss"], torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (alone, game), (_, sft), (loss, both) = gradient(Space()), gradient(Sft()), gradient(Space(), 10.0)
    assert loss == pytest.approx(alone)
    torch.testing.assert_close(both, game + 10 * sft, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_spin_then_dpo_is_one_recipe(make_recipe: MakeRecipe, tiny: Path, tmp_path: Path) -> None:
    """On preference data: SPIN reads the chosen answers, then DPO the pairs; the reference is SPIN's last model."""
    recipe = make_recipe("spin", data={"train": str(tiny / "pairs.jsonl")}, per_iteration={1: {"method": "dpo"}})
    run = play(recipe, tmp_path / "run").run
    assert not run.stage(1, "generate").exists()
    roles = {role for _, role, _, _ in read_scores(run.stage(1, "score") / "opponent.parquet")}
    assert roles == {"real", "rejected"}
    lines = Results(run.root).training(1)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["rewards/margins"] > 0 and lines[-1]["rewards/rejected"] < lines[-1]["rewards/real"]
    examples = load_training_examples(Iteration(run, recipe.at(1), 1))
    pairs = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(tiny / "model")
    worse = {tokenizer.decode(p.group.responses["rejected"][0], skip_special_tokens=True) for p in examples}
    assert worse <= {pair["rejected"] for pair in pairs}


@pytest.mark.slow
def test_both_iterations_are_scored_by_the_current_opponent(played: Callable[[str], Any]) -> None:
    recipe, run = played("spin")
    iteration = Iteration(run, recipe.at(1), 1)
    examples = load_training_examples(iteration)
    model = load_model(run.model(0), dtype=torch.float32, device=CPU)
    metrics = step_metrics(Scorer(model), recipe.method, examples, 256)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["log_ratio"] < 1e-5


def test_another_model_than_the_opponent_is_found_before_the_first_update(
    examples: list[TrainingExample], tiny: Path
) -> None:
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    for objective in (Spin(), Space()):
        metrics = step_metrics(Scorer(model), objective, examples, 1000)
        with pytest.raises(RunError, match="the policy must equal its opponent"):
            check_policy_equals_opponent(objective, metrics, "float32")
    for objective in (Tspin(), Sft()):
        check_policy_equals_opponent(objective, {}, "float32")  # they read no opponent


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 1)])
def test_iterations_may_differ_in_samples(before: int, after: int, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """SPIN trains on the answers of both: groups of different sizes, each scored and trained."""
    recipe = make_recipe(
        "spin",
        data={"held_out": 0, "limit": 24},
        train={"epochs": 1, "batch_size": 48},
        generate={"samples": before},
        per_iteration={1: {"generate.samples": after}},
    )
    run = play(recipe, tmp_path / "run").run
    examples = load_training_examples(Iteration(run, recipe.at(1), 1))
    sizes = [len(one.group.responses["generated"]) for one in examples]
    assert sizes == [after] * 24 + [before] * 24
    assert [len(one.opponent["generated"]) for one in examples] == sizes
    model = load_model(run.model(0), dtype=torch.float32, device=CPU)
    alone = [step_metrics(Scorer(model), recipe.method, [one], 1) for one in examples]
    assert max(one["log_ratio"] for one in alone) < 1e-5
    (line,) = Results(run.root).training(1)
    assert line["loss"] == pytest.approx(math.log(2), rel=1e-6)
    for name in ("logps/real", "logps/generated", "mean_logps/generated"):
        assert line[name] == pytest.approx(np.mean([one[name] for one in alone]), rel=1e-5), name


def test_the_loss_at_log_ratio_zero_is_the_published_constant(examples: list[TrainingExample]) -> None:
    @dataclass(frozen=True)
    class Wrong(Space):
        @property
        def start_loss(self) -> float:
            return 1.0

    for objective in (Spin(), Spin(lambda_=5.0), Space(mu=3.0), Sft()):
        check_start_loss(objective, examples)
    with pytest.raises(RunError, match="loss of space at log-ratio 0 is 1.386294 instead of 1.000000"):
        check_start_loss(Wrong(), examples)


@pytest.mark.slow
def test_the_proof_finds_one_training_step_of_difference(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """In float32 it tells models apart that one update at a usual rate made different."""
    recipe = make_recipe("space", iterations=1, train={"epochs": 1, "learning_rate": 1e-5, "batch_size": 48})
    run = play(recipe, tmp_path / "run").run
    examples = load_training_examples(Iteration(run, recipe, 0))
    model = load_model(run.model(0), dtype=torch.float32, device=CPU)
    metrics = step_metrics(Scorer(model), Space(), examples, 256)
    with pytest.raises(RunError):
        check_policy_equals_opponent(Space(), metrics, "float32")


@pytest.mark.slow
def test_a_non_finite_loss_stops_before_the_update(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    real, calls = sparring.stages.train.loop.forward_backward, []

    def poisoned(*args: object) -> dict[str, float]:
        calls.append(1)
        metrics = real(*args)  # type: ignore[arg-type]
        return {**metrics, "loss": math.nan} if len(calls) == 3 else metrics

    monkeypatch.setattr(sparring.stages.train.loop, "forward_backward", poisoned)
    recipe = make_recipe("space", iterations=1, train={"checkpoint_minutes": 0})
    with pytest.raises(RunError, match=r"Iteration 0, step 3: the loss is nan.*Nothing was updated"):
        play(recipe, tmp_path / "run")
    work = tmp_path / "run" / "iter-00" / ".train.partial"
    assert sorted(p.name for p in work.glob("step-*")) == ["step-00000001", "step-00000002"]
    monkeypatch.undo()
    clean = play(recipe, tmp_path / "clean").run
    continued = play(recipe, tmp_path / "run").run
    assert clean.digest(clean.model(0)) == continued.digest(continued.model(0))


def test_checkpoints_come_by_minutes(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 25 seconds, a checkpoint after each whole minute, and none after the last step."""
    real, steps, saved = sparring.stages.train.loop.forward_backward, [], []

    def counted(*arguments: object) -> dict[str, float]:
        steps.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sparring.stages.train.loop, "forward_backward", counted)
    monkeypatch.setattr(sparring.stages.train.loop, "time", SimpleNamespace(monotonic=lambda: 25.0 * len(steps)))
    monkeypatch.setattr(Checkpointer, "save", lambda self, step: saved.append(step))
    train = {"checkpoint_minutes": 1, "epochs": 3, "batch_size": 16}
    play(make_recipe("sft", iterations=1, train=train, data={"held_out": 0, "limit": 48}), tmp_path / "run")
    assert len(steps) == 9 and saved == [3, 6]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules(schedule: str) -> None:
    settings = Train.model_validate({"learning_rate": 1.0, "schedule": schedule, "warmup_ratio": 0.1})
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == 1.0 and min(rates) > 0, "no step is wasted on a rate of 0"
    after = rates[10:]
    if schedule == "constant":
        assert set(after) == {1.0}
    else:
        assert after == sorted(after, reverse=True)
        assert rates[55] == pytest.approx(0.5)
    assert learning_rate(0, 1, settings) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}, {"optimizer": "adamw"}])
def test_training_variants_run_and_learn(make_recipe: MakeRecipe, tmp_path: Path, change: dict[str, object]) -> None:
    recipe = make_recipe("space", iterations=1, train={"epochs": 4, "learning_rate": 3e-3, **change})
    run = play(recipe, tmp_path / "run").run
    lines = [json.loads(line) for line in (run.stage(0, "train") / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_number(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    plain = play(make_recipe("spin", iterations=1), tmp_path / "plain").run
    saved = play(make_recipe("spin", iterations=1, train={"gradient_checkpointing": True}), tmp_path / "saved").run
    for name in ("loss", "grad_norm"):
        values = [
            [json.loads(line)[name] for line in (run.stage(0, "train") / "metrics.jsonl").read_text().splitlines()]
            for run in (plain, saved)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_dropout_is_off(tiny: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "dropout"
    shutil.copytree(tiny / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    model = load_model(folder, dtype=torch.float32, device=CPU).train()
    ids = torch.arange(4, 12)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
