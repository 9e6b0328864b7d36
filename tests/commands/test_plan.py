"""`sparring plan`: its arithmetic checked by hand, measured speeds, and the distance to published times."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from sparring.cli import app
from sparring.commands.plan import (
    GPUS,
    LAYER_SECONDS,
    ModelSize,
    RowTokens,
    Speed,
    gpu_speed,
    measure_rows,
    measured_speed,
    num_rounds,
    plan,
    print_plan,
    sampling_batch_size,
)
from sparring.errors import UserError
from sparring.loop import play
from sparring.model.load import load_model
from sparring.recipe.schema import Recipe
from sparring.run.manifest import read_manifest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))  # the script imports its neighbours
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "plan_spin.py"))


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "config.json").write_text(json.dumps(SCRIPT["MISTRAL_7B"]))
    return tmp_path / "mistral"


def test_forward_flops_are_those_that_torch_counts(tiny: Path) -> None:
    """Of a full sequence, with attention over all positions, masked ones included, as torch counts it."""
    size = ModelSize.of(tiny / "model", "float32")
    model = load_model(tiny / "model", dtype=torch.float32, device=torch.device("cpu"))
    model.set_attn_implementation("eager")
    length = 64
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, length, dtype=torch.int64))
    causal = 4 * size.layers * size.width * length**2 / 2
    norms = sum(
        p.numel() for name, p in model.named_parameters() if "norm" in name
    )  # not matrices, so torch does not count them
    ours = size.forward_flops(0.0, [float(length)]) + causal - 2 * norms * length
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_sizes_of_mistral_7b(mistral: Path) -> None:
    size = ModelSize.of(mistral, "bfloat16")
    assert size.body + 2 * size.head == 7_241_732_096  # as published
    assert size.kv_bytes == 2 * 32 * 8 * 128 * 2


def test_time_scales_with_devices(make_recipe: Callable[..., Recipe], mistral: Path) -> None:
    recipe = make_recipe("spin", iterations=2, train={"batch_size": 64})
    tokens = RowTokens(1000, 100.0, 200.0, 200.0)
    speed = Speed(generate=100.0, score=1e12, train=1e12)
    one, eight, many = (plan(recipe, mistral, tokens, n, speed, None) for n in (1, 8, 128))
    first = one.iterations[0]
    assert first.generate == 1000 * 200 / 100
    size = ModelSize.of(mistral, recipe.train.dtype)
    group = size.forward_flops(100.0, [200.0, 200.0])
    assert first.score == pytest.approx(1000 * group / 1e12)
    assert first.train == pytest.approx(3 * recipe.train.epochs * 1000 * group / 1e12)
    assert one.iterations[1].train == pytest.approx(2 * first.train), "two iterations from iteration 1 on"
    assert eight.iterations[0].total == pytest.approx(first.total / 8)
    assert many.iterations[0].train == pytest.approx(first.train / 64), "a rank needs at least one prompt per step"
    assert one.gpu_hours == pytest.approx(sum(s.total for s in one.iterations) / 3600)


def test_methods_pay_only_for_what_they_read(make_recipe: Callable[..., Recipe], mistral: Path) -> None:
    tokens, speed = RowTokens(100, 50.0, 80.0, 80.0), Speed(10.0, 1e12, 1e12)

    def stages(method: str) -> object:
        recipe = make_recipe(method, iterations=1)
        return plan(recipe, mistral, tokens, 1, speed, None).iterations[0]

    assert stages("sft").generate == 0 and stages("sft").score == 0  # type: ignore[attr-defined]
    assert stages("tspin").generate > 0 and stages("tspin").score == 0  # type: ignore[attr-defined]
    assert stages("space").score > 0  # type: ignore[attr-defined]
    assert [num_rounds(make_recipe("spin", iterations=3), index) for index in range(3)] == [1, 2, 2]


def test_generation_speed_of_the_engines(make_recipe: Callable[..., Recipe], mistral: Path) -> None:
    tokens = RowTokens(1000, 100.0, 200.0, 200.0)
    size = ModelSize.of(mistral, "bfloat16")

    def rate(**settings: object) -> float:
        recipe = make_recipe("spin", generate={"max_new_tokens": 256, **settings}, train={"dtype": "bfloat16"})
        return gpu_speed(GPUS["a100"], recipe, size, tokens).generate

    assert rate(batch_size=1) == pytest.approx(200 / 256 / (32 * LAYER_SECONDS), rel=0.1), "it waits for Python"
    assert rate(batch_size=8) > 7 * rate(batch_size=1)
    assert rate(backend="vllm") > 3 * rate()
    small = make_recipe("spin", generate={"backend": "vllm", "max_new_tokens": 256})
    few = sampling_batch_size(small, size, RowTokens(1000, 30_000.0, 200.0, 200.0), GPUS["a100"])
    assert few == math.floor((0.9 * 80e9 - size.weight_bytes) / (30_200 * size.kv_bytes)) < 256


def test_a_measured_run_predicts_its_own_times(make_recipe: Callable[..., Recipe], tiny: Path, tmp_path: Path) -> None:
    recipe = make_recipe("space", iterations=1)
    run = play(recipe, tmp_path / "run").run
    size = ModelSize.of(tiny / "model", "float32")
    speed = measured_speed(run.root, size)
    drawn = read_manifest(run.stage(0, "generate")).info
    data = json.loads((run.data / "summary.json").read_text())
    mean = drawn["tokens"] / drawn["answers"]  # type: ignore[operator]
    tokens = RowTokens(data["num_train"], data["mean_prompt_tokens"], data["mean_real_tokens"], mean)
    again = plan(recipe, tiny / "model", tokens, 1, speed, None).iterations[0]
    for stage in ("generate", "score", "train"):
        assert getattr(again, stage) == pytest.approx(read_manifest(run.stage(0, stage)).info["seconds"]), stage
    with pytest.raises(UserError, match="differs from the recipe's"):
        measured_speed(run.root, ModelSize.of(tiny / "model", "bfloat16"))
    with pytest.raises(UserError, match="not a run that has finished"):
        measured_speed(tmp_path, size)


def test_the_command_prints_its_assumptions(make_recipe: Callable[..., Recipe], tiny: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny / 'model'}\nmethod: spin\ndata: {{train: {tiny / 'rows.jsonl'}}}\n")
    result = CliRunner().invoke(app, ["plan", str(recipe), "--gpus", "8", "--gpu", "h100", "--price", "2"])
    assert result.exit_code == 0, result.output
    for words in ("Memory per device, training", "Iteration 3: ", "GPU-hours, $", "Disk:", "Assumptions:", "40%"):
        assert words in result.output
    for gpu, measured, tokens, words in (
        (None, None, None, "Set the speed"),
        ("h900", None, None, "Use one of a100-40"),
        ("h100", None, "many", "not two numbers"),
    ):
        with pytest.raises(UserError, match=words):
            print_plan(make_recipe("spin"), 1, gpu, measured, None, tokens, None)


def test_given_token_counts_need_neither_rows_nor_weights(make_recipe: Callable[..., Recipe], mistral: Path) -> None:
    recipe = make_recipe("spin", generate={"max_new_tokens": 100}).model_copy(update={"model": str(mistral)})
    folder, tokens = measure_rows(recipe, 5000, (120.0, 180.0))
    assert folder == mistral and tokens == RowTokens(4988, 120.0, 100.0, 100.0)


def test_distance_to_spin_s_published_times(mistral: Path) -> None:
    """The numbers in docs/performance.md. A change of the rates or of the counting shows here."""
    found = SCRIPT["compare"](mistral)
    kept = json.loads((ROOT / "benchmarks" / "results" / "plan_spin.json").read_text())
    assert found["published_program_over_published"] == kept["published_program_over_published"]
    assert 0.3 < found["published_program_over_published"]["train"] < 3
    assert 0.3 < found["published_program_over_published"]["generate"] < 3
