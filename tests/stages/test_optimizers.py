"""Optimizers by name: what they compute, what they keep, and that a checkpoint keeps all of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparring.stages.train.loop
import sparring.stages.train.optimizers
from sparring.commands.demo import make_model
from sparring.commands.doctor import examine
from sparring.commands.forecast import empty_model, forecast, trained_tensors
from sparring.errors import UserError, RunError
from sparring.loop import play
from sparring.model.load import load_model, load_tokenizer, save_model
from sparring.model.lora import train_adapter
from sparring.recipe.optimizer_specs import BLOCK, KINDS, moment_bytes
from sparring.recipe.schema import Recipe
from sparring.stages.train.checkpoint import load_checkpoint, save_checkpoint
from sparring.stages.train.optimizers import make_optimizer, refuse_without_bitsandbytes

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
ON_CPU = [name for name, kind in KINDS.items() if not kind.is_paged]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HERE = list(KINDS) if torch.cuda.is_available() else ON_CPU


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


@pytest.mark.parametrize(
    ("name", "exact", "tolerance"),
    [
        ("rmsprop_bnb_8bit", "rmsprop", 0.05),
        ("adamw_8bit", "adamw", 0.05),
        ("paged_adamw_8bit", "adamw", 0.05),
        ("paged_adamw_32bit", "adamw", 1e-4),
    ],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_a_smaller_one_goes_where_torch_s_goes(name: str, exact: str, tolerance: float) -> None:
    """Eight steps against torch's, relative to the way that they went; with weight decay too, which RMSProp adds to the
    gradient and AdamW takes from the weights."""
    for decay in (0.0, 0.1):
        ours, theirs = (change(n, weight_decay=decay) for n in (name, exact))
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance
        if KINDS[name].is_8bit:
            assert not torch.equal(ours, theirs), "a control: it is another optimizer"


@pytest.mark.parametrize("name", HERE)
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
    save_checkpoint(tmp_path, 3, model, optimizer, tmp_path / "metrics.jsonl")
    walk(optimizer, model, 3, seed=1)

    again = fresh()
    restored = make_optimizer(name, again, 1e-3, 0.0)
    assert load_checkpoint(tmp_path, again, restored, tmp_path / "metrics.jsonl") == 3
    forgotten = fresh()
    for mine, saved in zip(forgotten.parameters(), again.parameters(), strict=True):
        mine.data.copy_(saved.data)
    walk(restored, again, 3, seed=1)
    walk(make_optimizer(name, forgotten, 1e-3, 0.0), forgotten, 3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), forgotten.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw_8bit", "rmsprop_bnb_8bit"])
def test_a_run_that_is_stopped_ends_with_the_same_bytes(
    name: str, make_recipe: MakeRecipe, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two iterations, so that a second model meets what the first has left; stopped within the second's training."""
    train = {"optimizer": name, "checkpoint_every": 1, "epochs": 1}
    quiet = {"held_out": False, "checker": None}
    recipe = make_recipe("space", model=str(wide), iterations=2, train=train, evaluate=quiet)
    clean = play(recipe, tmp_path / "clean")
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
    run = play(recipe, tmp_path / "run")
    assert run.digest(run.model(1)) == clean.digest(clean.model(1))
    exact = "adamw" if name == "adamw_8bit" else "rmsprop"
    plain = play(
        make_recipe("space", model=str(wide), train={**train, "optimizer": exact}, evaluate=quiet), tmp_path / "plain"
    )
    assert plain.digest(plain.model(0)) != clean.digest(clean.model(0)), "a control: in 32 bits it is another model"


@pytest.mark.parametrize("name", ON_CPU)
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
    if KINDS[name].is_8bit:
        assert torch.uint8 in kept, "there is something to forecast"
    if KINDS[name].is_8bit and adapter is None:
        assert optimizer.state[model.get_input_embeddings().weight]["state1"].dtype == torch.float32


def test_pages_are_not_of_the_device() -> None:
    here, paged = moment_bytes("paged_adamw_8bit", [1_000_000, 50_000, 100])
    assert paged == 2 * 1_000_000
    assert here == 2 * (4 * -(-1_000_000 // BLOCK) + 50_000 + 4 * -(-50_000 // BLOCK) + 4 * 100)
    assert moment_bytes("paged_adamw_32bit", [1_000_000, 100], 200_000) == (8 * 100, 8 * 1_200_000)
    assert moment_bytes("adamw_8bit", [4096], 4096) == (2 * (4096 + 4 * 16) + 8 * 4096, 0)


def test_what_does_not_run_is_refused(make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ON_CPU:
        refuse_without_bitsandbytes(name, CPU)
    with pytest.raises(UserError, match="paged_adamw_32bit moves its moments .* set adamw, which"):
        refuse_without_bitsandbytes("paged_adamw_32bit", CPU)
    recipe = make_recipe(train={"optimizer": "paged_adamw_8bit"})
    message = "moves its moments between a GPU and the machine, and this is cpu; set adamw_8bit"
    with pytest.raises(UserError, match=message):
        play(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists(), "nothing is left in the way"
    assert any(finding.level == "bad" and message in finding.text for finding in examine(recipe))
    later = make_recipe("spin", per_iteration={1: {"train.optimizer": "paged_adamw_8bit"}})
    with pytest.raises(UserError, match=message):
        play(later, tmp_path / "later")
    for launch in ("torchrun", "ray"):
        with pytest.raises(ValueError, match="fsdp2 cannot share adamw_8bit out; set adamw, or parallel: ddp"):
            make_recipe(train={"optimizer": "adamw_8bit"}, launch=launch, parallel="fsdp2")
    monkeypatch.setattr(sparring.stages.train.optimizers, "find_spec", lambda name: None)
    refuse_without_bitsandbytes("adamw", CPU)
    with pytest.raises(UserError, match=r"adamw_8bit is bitsandbytes'.*pip install 'sparring\[4bit\]', or set adamw"):
        refuse_without_bitsandbytes("adamw_8bit", CPU)


def test_a_device_without_a_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object, **more: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr("bitsandbytes.functional.optimizer_update_8bit_blockwise", fails)
    with pytest.raises(UserError, match="does not run rmsprop_bnb_8bit on cpu: RuntimeError: no kernel.*or set rmsprop"):
        refuse_without_bitsandbytes("rmsprop_bnb_8bit", CPU)
