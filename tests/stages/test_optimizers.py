"""Optimizers by name: what they compute, what they keep, and that a checkpoint keeps all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparring.model.optimizers
import sparring.stages.train.loop
from sparring.commands.demo import make_model
from sparring.commands.doctor import examine
from sparring.commands.forecast import empty_model, forecast, trained_tensors
from sparring.errors import RunError, UserError
from sparring.loop import play
from sparring.model.load import load_model, load_tokenizer, save_model
from sparring.model.lora import train_adapter
from sparring.model.optimizers import (
    BLOCK,
    NUM_MOMENTS,
    make_optimizer,
    optimizer_state_bytes,
    require_bitsandbytes,
)
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.stages.train.checkpoint import Checkpointer

pytestmark = pytest.mark.slow

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = list(NUM_MOMENTS)


@pytest.fixture(autouse=True)
def installed() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture(scope="module")
def wide(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with layers large enough for moments in 8 bits."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    tokenizer = load_tokenizer(tiny / "model")
    save_model(make_model(tokenizer, width=96, layers=1, seed=0), tokenizer, folder)
    return folder


def descend(name: str, model: nn.Module, steps: int, seed: int = 0, **settings: float) -> torch.optim.Optimizer:
    """Steps with gradients that a seed decides."""
    optimizer = make_optimizer(name, model, settings.get("learning_rate", 1e-3), settings.get("weight_decay", 0.0))
    walk(optimizer, model, steps, seed)
    return optimizer


def walk(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
        optimizer.step()


def change(name: str, **settings: float) -> Tensor:
    torch.manual_seed(7)
    layer = nn.Linear(64, 128)
    before = layer.weight.detach().clone()
    descend(name, layer, 8, **settings)
    return layer.weight.detach() - before


def test_the_plain_ones_are_torch_s() -> None:
    layer = nn.Linear(4, 4)
    rmsprop = make_optimizer("rmsprop", layer, 1e-3, 0.0)
    assert isinstance(rmsprop, torch.optim.RMSprop)
    assert (rmsprop.defaults["alpha"], rmsprop.defaults["momentum"], rmsprop.defaults["weight_decay"]) == (0.99, 0, 0)
    adamw = make_optimizer("adamw", layer, 1e-3, 0.1)
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["weight_decay"] == 0.1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_8bit_moves_as_adamw_does(decay: float) -> None:
    """Eight steps against torch's, relative to the distance that they moved."""
    ours, theirs = (change(name, weight_decay=decay) for name in ("adamw_8bit", "adamw"))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05
    assert not torch.equal(ours, theirs), "control: it is another optimizer"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_checkpoint_keeps_all_of_the_state(name: str, is_adapter: bool, wide: Path, tmp_path: Path) -> None:
    """Three steps, a checkpoint, three more: bit by bit those of six steps. A control leaves the state out."""

    def fresh() -> nn.Module:
        model = load_model(wide, dtype=torch.float32, device=DEVICE)
        if is_adapter:
            train_adapter(model, {"r": 64, "target_modules": "all-linear"}, seed=1)
        return model

    (tmp_path / "metrics.jsonl").touch()
    model = fresh()
    optimizer = descend(name, model, 3)
    with Checkpointer(tmp_path, model, optimizer, tmp_path / "metrics.jsonl", SingleProcess()) as checkpoints:
        checkpoints.save(3)
    walk(optimizer, model, 3, seed=1)

    again = fresh()
    restored = make_optimizer(name, again, 1e-3, 0.0)
    assert Checkpointer(tmp_path, again, restored, tmp_path / "metrics.jsonl", SingleProcess()).load() == 3
    forgotten = fresh()
    for mine, saved in zip(forgotten.parameters(), again.parameters(), strict=True):
        mine.data.copy_(saved.data)
    walk(restored, again, 3, seed=1)
    walk(make_optimizer(name, forgotten, 1e-3, 0.0), forgotten, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), forgotten.parameters(), strict=True))


def test_a_run_that_is_stopped_ends_with_the_same_bytes(
    make_recipe: MakeRecipe, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two iterations, since bitsandbytes keeps state from model to model; stopped within the second's training."""
    train = {"optimizer": "adamw_8bit", "checkpoint_minutes": 0, "epochs": 1}
    rows = {"held_out": 0, "limit": 48}
    recipe = make_recipe("space", model=str(wide), iterations=2, train=train, data=rows)
    clean = play(recipe, tmp_path / "clean").run
    steps = []
    real = sparring.stages.train.loop.forward_backward

    def stops(*arguments: object) -> dict[str, float]:
        steps.append(1)
        if len(steps) == 6:
            raise RunError("here")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(sparring.stages.train.loop, "forward_backward", stops)
    with pytest.raises(RunError, match="here"):
        play(recipe, tmp_path / "run")
    monkeypatch.undo()
    run = play(recipe, tmp_path / "run").run
    assert run.digest(run.model(1)) == clean.digest(clean.model(1))
    plain = play(
        make_recipe("space", model=str(wide), train={**train, "optimizer": "adamw"}, data=rows), tmp_path / "plain"
    ).run
    assert plain.digest(plain.model(0)) != clean.digest(clean.model(0)), "a control: in 32 bits it is another model"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("adapter", [None, {"r": 64}, {"r": 64, "use_dora": True}])
def test_the_forecast_of_moments_is_what_they_take(
    name: str, adapter: dict[str, object] | None, make_recipe: MakeRecipe, wide: Path
) -> None:
    recipe = make_recipe(model=str(wide), adapter=adapter, train={"optimizer": name})
    model = load_model(wide, dtype=torch.float32, device=CPU)
    if recipe.adapter is not None:
        train_adapter(model, recipe.adapter.for_peft(), 0)
    optimizer = descend(name, model, 1)
    tensors = [(key, value) for state in optimizer.state.values() for key, value in state.items()]
    held = sum(v.nbytes for key, v in tensors if isinstance(v, Tensor) and key != "step" and not key.startswith("qmap"))
    trained = trained_tensors(empty_model(wide), recipe.adapter)
    assert trained.total == sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = forecast(make_recipe(model=str(wide), adapter=adapter, train={"optimizer": "rmsprop"}), wide, 48)
    assert forecast(recipe, wide, 48).state_bytes - plain.state_bytes == held - 4 * trained.total
    kept = [v.dtype for key, v in tensors if key == "state1"]
    if name == "adamw_8bit":
        assert torch.uint8 in kept, "there is something to forecast"
    if name == "adamw_8bit" and adapter is None:
        assert optimizer.state[model.get_input_embeddings().weight]["state1"].dtype == torch.float32


def test_bytes_of_moments() -> None:
    assert optimizer_state_bytes("rmsprop", [1_000_000, 100]) == 4 * 1_000_100
    assert optimizer_state_bytes("adamw", [1_000_000, 100], 200_000) == 8 * 1_200_100
    assert optimizer_state_bytes("adamw_8bit", [4096, 100], 4096) == 2 * (4096 + 4 * 4096 // BLOCK) + 8 * (100 + 4096)


def test_what_does_not_run_is_refused(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        require_bitsandbytes(name, CPU)
    for launch in ("torchrun", "ray"):
        with pytest.raises(ValueError, match="fsdp2 cannot shard adamw_8bit"):
            make_recipe(train={"optimizer": "adamw_8bit"}, launch=launch, parallel="fsdp2")
    monkeypatch.setattr(sparring.model.optimizers, "find_spec", lambda name: None)
    require_bitsandbytes("adamw", CPU)
    with pytest.raises(UserError, match=r"adamw_8bit needs bitsandbytes.*pip install 'sparring\[4bit\]', or set adamw"):
        require_bitsandbytes("adamw_8bit", CPU)


def test_a_refused_optimizer_leaves_no_run_behind(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only a later iteration would use it."""
    monkeypatch.setattr(sparring.model.optimizers, "find_spec", lambda name: None)
    recipe = make_recipe(train={"optimizer": "adamw_8bit"})
    with pytest.raises(UserError, match="needs bitsandbytes"):
        play(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()
    assert any(finding.level == "bad" and "needs bitsandbytes" in finding.text for finding in examine(recipe))
    with pytest.raises(UserError, match="needs bitsandbytes"):
        play(make_recipe("spin", per_iteration={1: {"train.optimizer": "adamw_8bit"}}), tmp_path / "later")


def test_a_device_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("bitsandbytes.functional.optimizer_update_8bit_blockwise", fails)
    with pytest.raises(UserError, match="cannot run adamw_8bit on cpu: RuntimeError: no kernel.*or set adamw"):
        require_bitsandbytes("adamw_8bit", CPU)
