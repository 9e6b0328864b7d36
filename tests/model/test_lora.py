"""Adapters: the opponent of an iteration is the adapter of the one before, beside one base that nothing changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparring.errors import UserError
from sparring.loop import play
from sparring.model.load import load_model, resolve_model, save_merged, save_successor
from sparring.model.lora import BASE, CONFIG, WEIGHTS, train_adapter
from sparring.recipe.schema import Recipe
from sparring.run.iteration import Iteration
from sparring.run.manifest import hash_path, read_manifest
from sparring.run.results import Results
from sparring.run.rundir import RunDir

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]

CPU = torch.device("cpu")
SMALL = {"r": 4, "lora_alpha": 8}
KINDS = {
    "lora": SMALL,
    "rslora": {**SMALL, "use_rslora": True},
    "dora": {**SMALL, "use_dora": True},
    "some modules": {**SMALL, "target_modules": ["q_proj", "v_proj"]},
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(4, 16)[None]).logits


@pytest.fixture(scope="module")
def played(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Three iterations with an adapter; the start's proof of every one of them held, or this would have stopped."""
    train = {"learning_rate": 1e-2, "epochs": 1}
    recipe = make_recipe("spin", iterations=3, adapter=SMALL, generate={"max_new_tokens": 12}, train=train)
    return play(recipe, tmp_path_factory.mktemp("adapters") / "run").run


def test_the_run_holds_adapters_and_one_reference_to_their_base(played: RunDir, tiny: Path) -> None:
    base = (tiny / "model").resolve()
    for t in range(3):
        assert {p.name for p in played.model(t).iterdir()} >= {CONFIG, WEIGHTS, BASE}
        assert json.loads((played.model(t) / BASE).read_text()) == {"folder": str(base), "xxh3": hash_path(base)}
        assert (played.model(t) / WEIGHTS).stat().st_size < (base / "model.safetensors").stat().st_size
    assert not list(played.root.rglob("model.safetensors"))


def test_the_opponent_is_the_adapter_before(played: RunDir) -> None:
    """Each iteration names the adapter it drew from and started at, and each of them is another one."""
    for t in range(1, 3):
        opponent = Iteration(played, Results(played.root).recipe, t).opponent
        assert opponent == played.model(t - 1)
        for stage in ("generate", "score", "train"):
            input_digests = read_manifest(played.stage(t, stage)).input_digests
            assert input_digests[f"iter-{t - 1:02d}/train/model"] == played.digest(opponent)
    outputs = [logits(load_model(played.model(t), dtype=torch.float32, device=CPU)) for t in range(3)]
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-3)


def test_every_iteration_starts_at_its_opponent(played: RunDir) -> None:
    for t in range(3):
        first, *_, last = Results(played.root).training(t)
        assert first["log_ratio"] <= 1e-6 and first["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert last["log_ratio"] > 1e-3, "and moves away from it"


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("lora", "bfloat16"), ("dora", "bfloat16"), ("rslora", "float32"), ("some modules", "float32")],
)
def test_every_kind_is_played(make_recipe: MakeRecipe, tmp_path: Path, kind: str, dtype: str) -> None:
    """In bfloat16 the frozen base is kept in bfloat16; the proof before the first step holds all the same."""
    recipe = make_recipe(
        "space",
        adapter=KINDS[kind],
        data={"limit": 24, "held_out": 4},
        train={"epochs": 1, "dtype": dtype, "learning_rate": 1e-2},
        evaluate={"checker": None},
    )
    run = play(recipe, tmp_path / "run").run
    model = load_model(run.model(1), dtype=getattr(torch, dtype), device=CPU)
    sizes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert {d for n, d in sizes.items() if "lora_" in n} == {torch.float32}
    assert {d for n, d in sizes.items() if "lora_" not in n} == {getattr(torch, dtype)}


def test_the_base_is_not_touched_and_a_new_adapter_changes_nothing(tiny: Path) -> None:
    plain = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    expected = logits(plain)
    state = torch.random.get_rng_state()
    for kind in KINDS.values():
        model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
        train_adapter(model, {"target_modules": "all-linear", **kind}, seed=1)
        assert torch.equal(logits(model), expected)
        trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        assert trainable and all("lora_" in name for name in trainable)
        assert all(
            torch.equal(p, before[name.replace(".base_layer", "")])
            for name, p in model.state_dict().items()
            if "lora_" not in name
        )
    assert torch.equal(torch.random.get_rng_state(), state), "no state of random numbers is left changed"


def test_the_same_seed_gives_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 1), ("other", 2)):
        model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
        train_adapter(model, {"target_modules": "all-linear", **SMALL}, seed)
        save_successor(model, tiny / "model", tmp_path / name)
    assert hash_path(tmp_path / "one") == hash_path(tmp_path / "two") != hash_path(tmp_path / "other")


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_is_the_adapted_one(tiny: Path, tmp_path: Path, kind: str) -> None:
    """Up to float32 rounding in the logits, and to the same greedy tokens."""
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    train_adapter(model, {"target_modules": "all-linear", **KINDS[kind]}, seed=1)
    with torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    assert not torch.allclose(logits(model), logits(load_model(tiny / "model", dtype=torch.float32, device=CPU)))
    save_successor(model, tiny / "model", tmp_path / "adapter")
    save_merged(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert torch.allclose(logits(merged), logits(model), atol=2e-5)
    ids = torch.arange(4, 12)[None]
    assert torch.equal(merged.generate(ids, max_new_tokens=20), model.generate(ids, max_new_tokens=20))


def test_merged_in_each_iteration(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A whole model after each iteration, equal to its opponent with the adapter that was trained on it."""
    recipe = make_recipe(
        "spin", adapter={**SMALL, "merge": "each_iteration"}, train={"epochs": 1, "learning_rate": 1e-2}
    )
    run = play(recipe, tmp_path / "run").run
    bases = [Path(recipe.model), run.model(0)]
    for t, base in enumerate(bases):
        adapter = run.stage(t, "train") / "adapter"
        assert json.loads((adapter / BASE).read_text())["xxh3"] == hash_path(base)
        parts = load_model(adapter, dtype=torch.float32, device=CPU)
        whole = load_model(run.model(t), dtype=torch.float32, device=CPU)
        assert torch.allclose(logits(parts), logits(whole), atol=2e-5)
        assert not torch.allclose(logits(whole), logits(load_model(base, dtype=torch.float32, device=CPU)), atol=1e-3)
        assert Results(run.root).training(t)[0]["log_ratio"] <= 1e-6


def test_what_cannot_be_is_refused(played: RunDir, tiny: Path, tmp_path: Path) -> None:
    model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
    with pytest.raises(UserError, match="adapter: Target modules .*no_such"):
        train_adapter(model, {"target_modules": ["no_such"]}, seed=0)
    for target in ("lm_head", "embed_tokens"):
        model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
        with pytest.raises(UserError, match="the output head are not supported"):
            train_adapter(model, {"target_modules": [target, "q_proj"]}, seed=0)
    with pytest.raises(UserError, match="is an adapter. Merge it first with 'sparring export RUN_DIR OUT --merge'"):
        resolve_model(str(played.model(0)))
    copy = shutil.copytree(played.model(0), tmp_path / "copy")
    weights = (copy / WEIGHTS).read_bytes()
    (copy / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(copy, dtype=torch.float32, device=CPU)
    from safetensors.torch import load_file, save_file

    (copy / WEIGHTS).write_bytes(weights)
    kept = load_file(copy / WEIGHTS)
    save_file(dict(list(kept.items())[1:]), copy / WEIGHTS)
    with pytest.raises(UserError, match="does not match its base"):
        load_model(copy, dtype=torch.float32, device=CPU)
    text = (copy / CONFIG).read_text().replace(str(tiny), "/nowhere")
    (copy / CONFIG).write_text(text)
    with pytest.raises(UserError, match="is an adapter of /nowhere/model, which does not exist"):
        load_model(copy, dtype=torch.float32, device=CPU)
