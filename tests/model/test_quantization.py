"""An adapter on a base in 4 bits: sampling, scoring, training and export see the same quantized weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import sparring.model.quantization
from sparring.commands.doctor import examine
from sparring.commands.export import export_model
from sparring.commands.forecast import forecast
from sparring.errors import UserError
from sparring.loop import play
from sparring.model.load import load_model, resolve_model, save_successor
from sparring.model.lora import CONFIG, WEIGHTS, train_adapter
from sparring.model.quantization import dequantize, import_bitsandbytes, quantized_layers, require_4bit
from sparring.recipe.load import make_recipe as recipe_of
from sparring.recipe.schema import Adapter, Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import hash_path
from sparring.run.results import Results
from sparring.run.rundir import RunDir
from sparring.run.session import check_settings
from sparring.stages.generate import backend_factory, write_dequantized_base
from sparring.stages.generate.vllm import VllmBackend
from sparring.stages.prepare import prepare

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
IDS = torch.arange(4, 16)[None]
ADAPTER = {"r": 4, "lora_alpha": 8, "load_in_4bit": True}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with widths that bitsandbytes' kernel for some CPUs also takes: one layer's is 32 times 3."""
    target = tmp_path_factory.mktemp("wide") / "model"
    shutil.copytree(tiny / "model", target)
    config = json.loads((target / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96, "head_dim": 64 // config["num_attention_heads"]}
    (target / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    from transformers import AutoConfig

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(target)).save_pretrained(target)
    return target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_and_evaluation_compute_the_same(wide: Path, dtype: torch.dtype) -> None:
    """bitsandbytes alone does not on every CPU: it rounds the scales of a layer that is used in evaluation."""
    model = load_model(wide, dtype=dtype, device=CPU, in_4bit=True)
    assert len(quantized_layers(model)) == 2 * 7 and type(model.get_output_embeddings()) is torch.nn.Linear
    evaluated = logits(model)
    assert torch.equal(logits(model.train()), evaluated)
    with torch.enable_grad():
        train_adapter(model, {"r": 4, "target_modules": "all-linear"}, seed=1)
        assert torch.equal(model(IDS).logits, evaluated), "a new adapter changes nothing, gradient or not"
    original = logits(load_model(wide, dtype=dtype, device=CPU))
    assert (evaluated - original).abs().max() > 0.01, "4 bits are another model than the original"


def test_dequantized_is_the_same_function(wide: Path) -> None:
    model = load_model(wide, dtype=torch.float32, device=CPU, in_4bit=True)
    expected = logits(model)
    dequantize(model)
    assert torch.equal(logits(model), expected)
    assert not quantized_layers(model) and not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vllm_serves_what_is_trained(dtype: str, make_recipe: MakeRecipe, wide: Path, tmp_path: Path) -> None:
    """A plain copy, in the compute dtype, of the numbers that the base in 4 bits computes with; written once."""
    recipe = make_recipe("spin", model=str(wide), adapter=ADAPTER, generate={"backend": "vllm"}, train={"dtype": dtype})
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    check_settings(run, recipe)
    prepare(run, recipe)
    iteration = Iteration(run, recipe, 0)
    write_dequantized_base(iteration)
    copy, exact = run.root / "dequantized", getattr(torch, dtype)
    expected = logits(load_model(wide, dtype=exact, device=CPU, in_4bit=True))
    assert torch.equal(logits(load_model(copy, dtype=exact, device=CPU)), expected)
    written = (copy / "MANIFEST.json").stat().st_mtime_ns
    write_dequantized_base(iteration)
    assert (copy / "MANIFEST.json").stat().st_mtime_ns == written
    (copy / "model.safetensors").write_bytes(b"rotten")
    write_dequantized_base(iteration)
    assert torch.equal(logits(load_model(copy, dtype=exact, device=CPU)), expected)

    adapted = load_model(wide, dtype=exact, device=CPU)
    train_adapter(adapted, {"r": 4, "target_modules": "all-linear"}, seed=1)
    save_successor(adapted, wide, tmp_path / "adapter")
    for model, adapter in ((wide, None), (tmp_path / "adapter", str(tmp_path / "adapter"))):
        with backend_factory(iteration)(model) as engine:
            assert isinstance(engine, VllmBackend)
            assert engine.hello["engine"]["model"] == str(copy) and engine.hello["adapter"] == adapter


@pytest.fixture(scope="module")
def runs(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDir]:
    """Three iterations in float32, twice, and two in bfloat16 with DoRA."""
    folder = tmp_path_factory.mktemp("4bit")
    common: dict[str, Any] = {"data": {"held_out": 4, "limit": 20}, "generate": {"max_new_tokens": 12}}
    train = {"learning_rate": 1e-2, "batch_size": 8, "epochs": 1}
    one = make_recipe("spin", iterations=3, adapter=ADAPTER, train=train, **common)
    dora = {"adapter": {**ADAPTER, "use_dora": True}, "train": {**train, "dtype": "bfloat16"}}
    recipes = {
        "one": one,
        "two": one.model_copy(update={"iterations": 2}),
        "dora": make_recipe("space", iterations=2, **dora, **common),
    }
    return {name: play(recipe, folder / name).run for name, recipe in recipes.items()}


def test_every_iteration_starts_at_its_opponent(runs: dict[str, RunDir]) -> None:
    """Sampled, scored and trained on the same 4-bit base: in float32 every log-ratio is exactly 0."""
    for t in range(3):
        first, *_, last = Results(runs["one"].root).training(t)
        assert first["log_ratio"] == 0 and first["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert last["log_ratio"] > 1e-3, "and moves away from it"
    for t in range(2):
        assert Results(runs["dora"].root).training(t)[0]["log_ratio"] < 5e-3
    assert {p.name for p in runs["one"].model(1).iterdir()} >= {CONFIG, WEIGHTS, "base.json"}
    assert not list(runs["one"].root.rglob("model.safetensors"))


def test_the_same_run_gives_the_same_bytes(runs: dict[str, RunDir]) -> None:
    for t in range(2):
        assert hash_path(runs["one"].model(t)) == hash_path(runs["two"].model(t))


def test_another_base_is_found_by_the_proof(tiny: Path, runs: dict[str, RunDir], tmp_path: Path) -> None:
    """A control: an iteration that was scored on the original weights does not pass."""
    from sparring.errors import RunError
    from sparring.parallel import SingleProcess
    from sparring.run.iteration import Iteration
    from sparring.stages.score import score
    from sparring.stages.train.loop import train

    run = RunDir(shutil.copytree(runs["one"].root, tmp_path / "run"))
    shutil.rmtree(run.stage(1, "score"))
    shutil.rmtree(run.stage(1, "train"))
    recipe = Results(run.root).recipe
    plain = recipe.model_copy(update={"adapter": Adapter(r=4, lora_alpha=8)})
    score(Iteration(run, plain, 1), SingleProcess())
    with pytest.raises(RunError, match="Before the first update the policy must equal its opponent"):
        train(Iteration(run, recipe, 1), SingleProcess())


def test_merged_is_what_was_trained(runs: dict[str, RunDir], tiny: Path, tmp_path: Path) -> None:
    """The base dequantized plus the adapter: the run's own logits up to float32 rounding, in a plain model."""
    results = Results(runs["one"].root)
    export_model(results, tmp_path / "merged", iteration="2", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    played = load_model(runs["one"].model(2), dtype=torch.float32, device=CPU, in_4bit=True)
    assert torch.allclose(logits(merged), logits(played), atol=2e-5)
    on_original = load_model(runs["one"].model(2), dtype=torch.float32, device=CPU)
    assert not torch.allclose(logits(merged), logits(on_original), atol=1e-4), "a control: the original base"
    greedy = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(merged.generate(IDS, **greedy), played.generate(IDS, **greedy))


def test_an_exported_adapter_says_what_it_needs(runs: dict[str, RunDir], tmp_path: Path) -> None:
    """As the card has it: transformers and peft alone then compute what the run did."""
    from peft import PeftModel

    export_model(Results(runs["one"].root), tmp_path / "out", iteration="2")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'bnb_4bit_quant_type="nf4"' in card and "torch.float32" in card
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "out").train()  # bitsandbytes' own kernel refuses odd widths
    played = load_model(runs["one"].model(2), dtype=torch.float32, device=CPU, in_4bit=True)
    assert torch.equal(logits(model), logits(played))


def test_what_cannot_be_is_refused(
    make_recipe: MakeRecipe, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="Remove one of the two"):
        make_recipe(adapter={**ADAPTER, "merge": "each_iteration"})
    with pytest.raises(ValueError, match="a server would sample from other weights than are trained"):
        make_recipe(adapter=ADAPTER, generate={"backend": "server", "url": "http://127.0.0.1:1"})
    recipe = make_recipe(adapter=ADAPTER)
    assert any(f"bitsandbytes {version('bitsandbytes')}" in finding.text for finding in examine(recipe))
    monkeypatch.setattr(sparring.model.quantization, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"bitsandbytes is not installed. Run pip install 'sparring\[4bit\]'"):
        play(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists(), "nothing is left in the way"
    assert any(finding.level == "bad" and "pip install" in finding.text for finding in examine(recipe))
    monkeypatch.undo()


def test_a_device_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fails)
    with pytest.raises(
        UserError, match="bitsandbytes cannot run on cpu: RuntimeError: no kernel image.*remove adapter"
    ):
        require_4bit(CPU)


def test_weights_that_are_stored_quantized_are_refused(tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU, in_4bit=True)
    save_successor(model, tiny / "model", tmp_path / "model")
    with pytest.raises(UserError, match="are stored quantized; give the original weights, and adapter.load_in_4bit"):
        resolve_model(str(tmp_path / "model"))


def test_the_forecast_knows_the_smaller_base(make_recipe: MakeRecipe, wide: Path) -> None:
    """Against what the layers really hold."""
    recipe = make_recipe(model=str(wide), adapter=ADAPTER, train={"optimizer": "adamw"})
    plain = make_recipe(model=str(wide), adapter={"r": 4, "lora_alpha": 8}, train={"optimizer": "adamw"})
    saved = forecast(plain, wide, 100).state_bytes - forecast(recipe, wide, 100).state_bytes
    model = load_model(wide, dtype=torch.float32, device=CPU, in_4bit=True)
    layers = [module.weight for module in quantized_layers(model).values()]
    states = [weight.quant_state for weight in layers]
    held = sum(w.nbytes + s.absmax.nbytes + s.state2.absmax.nbytes for w, s in zip(layers, states, strict=True))
    assert saved == pytest.approx(4 * sum(s.shape.numel() for s in states) - held, rel=0.01)


def test_no_kernel_is_fetched_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some CPUs the import of bitsandbytes would fetch one, and run it, where `kernels` is installed."""

    class Kernels:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"kernels.{name} was asked for")

    ours = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "bitsandbytes"}
    for name in ours:
        monkeypatch.delitem(sys.modules, name)
    seen: list[object] = []
    monkeypatch.setitem(sys.modules, "kernels", Kernels())
    real = __import__

    def watched(name: str, *rest: Any, **more: Any) -> Any:
        if name == "bitsandbytes":
            seen.append(sys.modules["kernels"])
            return None
        return real(name, *rest, **more)

    monkeypatch.setattr("builtins.__import__", watched)
    import_bitsandbytes()
    assert seen == [None] and isinstance(sys.modules["kernels"], Kernels)
    sys.modules.update(ours)


def test_stories260k_in_4_bits(shared: Path, tmp_path: Path) -> None:
    """A real model on real stories, merged to a model that tells them in the same words."""
    recipe = recipe_of(
        {
            "model": str(shared / "models" / "stories260K"),
            "method": "space",
            "iterations": 1,
            "data": {
                "train": str(shared / "data" / "tinystories" / "stories.jsonl"),
                "split_on": "sentence",
                "limit": 24,
                "held_out": 8,
            },
            "adapter": ADAPTER,
            "generate": {"max_new_tokens": 32},
            "train": {"learning_rate": 3e-4, "batch_size": 8, "dtype": "float32", "epochs": 1, "max_length": 256},
        }
    )
    run = play(recipe, tmp_path / "run").run
    before, after = Results(run.root).evaluations().values()
    assert Results(run.root).training(0)[0]["log_ratio"] == 0
    assert before["held_out_nll"] < 2.2, "in 4 bits it still knows stories"
    assert after["held_out_nll"] < before["held_out_nll"], "and learns"
    export_model(Results(run.root), tmp_path / "out", iteration="0", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    played = load_model(run.model(0), dtype=torch.float32, device=CPU, in_4bit=True)
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    greedy = {"max_new_tokens": 60, "do_sample": False}
    assert torch.equal(merged.generate(ids, **greedy), played.generate(ids, **greedy))
