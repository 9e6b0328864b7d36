"""DeepSpeed's ZeRO: refusals and memory. How it trains is held in tests/ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from sparring.commands.doctor import examine
from sparring.commands.forecast import forecast
from sparring.errors import Refused
from sparring.loop import play
from sparring.parallel import zero
from sparring.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]


def test_without_deepspeed_nothing_begins(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero, "find_spec", lambda name: None)
    wanted = make_recipe(launch="torchrun", parallel="zero2", processes=2)
    words = r"parallel: zero2 needs DeepSpeed.* pip install 'sparring\[deepspeed\]', or set parallel: fsdp2"
    with pytest.raises(Refused, match=words):
        play(wanted, tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists() and not (tmp_path / "run" / "recipe.yaml").exists()
    assert any("sparring[deepspeed]" in found.text for found in examine(wanted) if found.level == "bad")
    alone = make_recipe(parallel="zero2")  # one process trains in one way, whatever ranks would do
    assert not any("deepspeed" in found.text.lower() for found in examine(alone))


def test_memory_on_each_device(make_recipe: MakeRecipe, tiny: Path) -> None:
    needs = forecast(make_recipe(), tiny / "model", 48)
    each = 4 * needs.num_parameters  # of weights, gradients, and RMSProp's one moment; DeepSpeed has weights twice
    assert needs.state_on_each("ddp", 4) == 3 * each
    assert needs.state_on_each("fsdp2", 4) == 3 * each / 4
    assert needs.state_on_each("zero2", 4) == each + 3 * each / 4
    assert needs.state_on_each("zero3", 4) == 4 * each / 4
    assert {needs.state_on_each(way, 1) for way in ("ddp", "fsdp2", "zero2", "zero3")} == {3 * each}


@pytest.mark.parametrize("launch", ["torchrun", "ray"])
def test_weights_in_4_bits_are_not_shared_out(launch: str, make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValidationError, match="4-bit weights cannot be shared out by zero3; set ddp"):
        make_recipe(launch=launch, parallel="zero3", adapter={"load_in_4bit": True})
