"""SDFT from the front door: what its teacher is shown and finds, and what training makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from shortcuts import generations, step_metrics

from sparring.commands.compare import compare, reuse_stages
from sparring.data.read import BadRow
from sparring.data.render import Renderer
from sparring.data.tables import read_candidates
from sparring.data.teacher import teacher_prompt_ids
from sparring.errors import UserError
from sparring.loop import play
from sparring.model.load import load_config, load_model, load_tokenizer
from sparring.model.logprobs import Scorer, score_candidates
from sparring.model.packing import Packing
from sparring.objectives import Sdft
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import copy_committed
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings
from sparring.stages.train.dry_run import peak_bytes
from sparring.types import Example, Group, Message, Teacher, TrainingExample

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
SHORT = "{prompt} {response} again"
METHOD = {"name": "sdft", "top_k": 5, "teacher_prompt": SHORT}


@pytest.fixture(scope="module")
def run(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    recipe = make_recipe(METHOD, iterations=1, data={"held_out": 0}, train={"epochs": 1}, generate={"samples": 2})
    return play(recipe, tmp_path_factory.mktemp("sdft") / "run").run


def test_the_teacher_s_table_is_what_the_model_s_own_logits_give(run: RunDir, make_recipe: MakeRecipe) -> None:
    """The prompt is written by hand here, with the tokenizer's own template."""
    iteration = Iteration(run, make_recipe(METHOD), 0)
    tokenizer = load_tokenizer(iteration.opponent)
    model = load_model(iteration.opponent, dtype=torch.float32, device=CPU)
    found, drawn, rows = (
        read_candidates(run.stage(0, "score") / "teacher.parquet"),
        generations(iteration, 0),
        iteration.train_rows(),
    )
    assert found.keys() == {(row.id, 0, sample) for row in rows for sample in (0, 1)}
    for row in rows[:3]:
        source = json.loads(row.source)
        asked = [{"role": "user", "content": f"{source['question']} {source['answer']} again"}]
        text = cast(str, tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
        prompt = cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])
        for sample in (0, 1):
            response = drawn[row.id][sample].token_ids
            ids = torch.tensor([[*prompt, *response.tolist()]])
            with torch.no_grad():
                logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            candidates, logprobs = found[row.id, 0, sample]
            expected = logp.topk(5)
            np.testing.assert_array_equal(candidates, expected.indices.numpy())
            np.testing.assert_allclose(logprobs[:, 1:], expected.values.numpy(), atol=2e-5)
            own = logp[torch.arange(len(response)), torch.from_numpy(response.astype(np.int64))]
            np.testing.assert_allclose(logprobs[:, 0], own.numpy(), atol=2e-5)


def test_training_reports_the_divergence_and_no_rewards(run: RunDir) -> None:
    lines = Results(run.root).training(0)
    assert len(lines) == 4  # 60 rows in batches of 16
    for line in lines:
        assert line["loss"] >= 0 and line["grad_norm"] > 0 and np.isfinite(line["kl_from_teacher"])
        assert not {name for name in line if name.startswith("rewards/")} and "log_ratio" not in line


def test_trained_again_from_the_same_scores_it_has_the_same_bytes(run: RunDir, tmp_path: Path) -> None:
    """As after a kill in the train stage."""
    again = tmp_path / "run"
    shutil.copytree(run.root, again)
    weights = again / "iter-00" / "train" / "model" / "model.safetensors"
    before = weights.read_bytes()
    shutil.rmtree(again / "iter-00" / "train")
    scored = (again / "iter-00" / "score" / "MANIFEST.json").stat().st_mtime_ns
    play(again / "recipe.yaml", again)
    assert weights.read_bytes() == before
    assert (again / "iter-00" / "score" / "MANIFEST.json").stat().st_mtime_ns == scored


def test_an_arm_with_another_teacher_takes_the_responses_and_not_the_scores(
    run: RunDir, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    for name, prompt in (("same", SHORT), ("other", "{response} {prompt}")):
        arm = RunDir(tmp_path / name)
        arm.root.mkdir()
        recipe = make_recipe({**METHOD, "teacher_prompt": prompt}, iterations=1, data={"held_out": 0})
        check_settings(arm, recipe)
        copy_committed(run.data, arm.data)
        reuse_stages(Iteration(arm, recipe, 0), [run])
        assert arm.stage(0, "generate").exists()
        assert arm.stage(0, "score").exists() == (name == "same")


@pytest.fixture(scope="module")
def examples() -> list[TrainingExample]:
    random = np.random.default_rng(0)

    def one(number: int) -> TrainingExample:
        lengths = random.integers(1, 9, 2)
        responses = tuple(random.integers(4, 40, n).astype(np.int32) for n in lengths)
        candidates = tuple(random.integers(4, 40, (n, 3)).astype(np.int32) for n in lengths)
        logprobs = np.zeros((2, lengths.max(), 4), dtype=np.float32)
        for sample, n in enumerate(lengths):
            logprobs[sample, :n] = np.log(random.dirichlet(np.ones(5), n)[:, :4])
        prompt = random.integers(4, 40, random.integers(2, 9)).astype(np.int32)
        return TrainingExample(
            Group(str(number), prompt, {"generated": responses}, {"generated": candidates}), {"generated": logprobs}
        )

    return [one(number) for number in range(7)]


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_packing_and_micro_batches_change_neither_loss_nor_gradient(
    kl: Any, examples: list[TrainingExample], tiny: Path
) -> None:
    results = []
    ways: list[tuple[Packing, int]] = [("shared", 10_000), ("shared", 60), ("padded", 10_000), ("padded", 1)]
    for packing, micro_batch_tokens in ways:
        model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
        scorer = Scorer(model, packing=packing)
        metrics = step_metrics(scorer, Sdft(kl=kl, top_k=3), examples, micro_batch_tokens)
        del metrics["num_tokens"]
        results.append((metrics, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    for metrics, gradient in results[1:]:
        assert metrics == pytest.approx(results[0][0], rel=1e-5, abs=1e-5)
        torch.testing.assert_close(gradient, results[0][1], atol=1e-5, rtol=1e-4)


def test_ranks_divide_the_groups(examples: list[TrainingExample], tiny: Path) -> None:
    """What ranks find adds up to what one process finds: each leaves 0 where it computed nothing."""
    scorer = Scorer(load_model(tiny / "model", dtype=torch.float32, device=CPU))
    groups = [replace(example.group, candidates={}) for example in examples]
    whole = score_candidates(scorer, groups, 4, 60, SingleProcess())
    ranks = [SingleProcess(rank=rank, num_ranks=2) for rank in (0, 1)]
    parts = [score_candidates(scorer, groups, 4, 60, rank) for rank in ranks]
    assert all(0 < np.count_nonzero(part[1]) < np.count_nonzero(whole[1]) for part in parts)
    np.testing.assert_array_equal(parts[0][0] + parts[1][0], whole[0])
    np.testing.assert_allclose(parts[0][1] + parts[1][1], whole[1], atol=1e-5)


def test_the_teacher_s_prompt_replaces_the_last_user_turn(tiny: Path) -> None:
    """Earlier turns stay, and what a response writes in braces is not filled in again."""
    render = Renderer(load_tokenizer(tiny / "model"), template=None, end_token=None, max_length=100, max_response=None)
    said = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4 {prompt}")]
    example = Example("a", 1, tuple(Message(role=role, content=text) for role, text in said))
    ids = teacher_prompt_ids(render, Teacher("{response} 5 {prompt}", 1), example, "4 {prompt}", 10, 200)
    shown = [*example.messages[:2], Message(role="user", content="4 {prompt} 5 3")]
    assert ids.tolist() == render.prompt_ids(shown)
    with pytest.raises(BadRow, match=rf"has {len(ids)} tokens and leaves no room for a response of 10 .*context is 20"):
        teacher_prompt_ids(render, Teacher("{response} 5 {prompt}", 1), example, "4 {prompt}", 10, 20)


def test_rows_that_do_not_fit_are_refused_before_anything_is_generated(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The model's context has 128 tokens."""
    recipe = make_recipe({**METHOD, "teacher_prompt": 12 * "{prompt} {response} "})
    with pytest.raises(UserError, match=r"row 1 of .*the teacher's prompt has \d+ tokens and leaves no room .*128"):
        play(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "iter-00").exists()


def test_rows_of_a_comparison_have_to_fit_each_method(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """The recipe has another method. A teacher's prompt and 90 new tokens do not fit into a context of 128."""
    with pytest.raises(UserError, match=r"row 1 of .*the teacher's prompt has \d+ tokens"):
        compare(make_recipe("space", generate={"max_new_tokens": 90}), tmp_path, methods=["space", "sdft"], seeds=1)
    assert not list(tmp_path.glob("seed-*"))


def test_what_it_cannot_do_is_refused(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValidationError, match=r"teacher_prompt has no \{response\}"):
        make_recipe({"name": "sdft", "teacher_prompt": "{prompt}"})
    with pytest.raises(ValidationError, match="sft_weight: sdft does not train on real responses"):
        make_recipe("sdft", train={"sft_weight": 0.5})
    with pytest.raises(ValidationError, match="sft_weight: sdft does not train on real responses"):
        make_recipe("spin", train={"sft_weight": 0.5}, per_iteration={1: {"method": "sdft"}})


def test_the_forecast_knows_the_candidates(make_recipe: MakeRecipe, tiny: Path) -> None:
    config = load_config(tiny / "model")
    peaks = [peak_bytes(make_recipe({"name": "sdft", "kl": kl}), config, 512, "cpu") for kl in ("forward", "reverse")]
    assert peaks[0] > peaks[1]
