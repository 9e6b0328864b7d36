"""The memory of a step from fake tensors: it is that of the real step, and few layers tell it of many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3NextConfig

from sparring.model.live_memory import LiveMemory
from sparring.model.load import load_config, load_model
from sparring.model.logprobs import Scorer
from sparring.model.packing import pack_shared
from sparring.parallel import SingleProcess
from sparring.recipe.schema import Recipe
from sparring.stages.train.dry_run import Unprobed, layer_period, peak_bytes, phase_peaks, with_layers
from sparring.stages.train.policy import make_policy
from sparring.stages.train.step import forward_backward
from sparring.types import Group, TrainingExample

MakeRecipe = Callable[..., Recipe]
CPU = torch.device("cpu")
GIB = 2**30
SMALL = LlamaConfig(
    vocab_size=500,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)
MISTRAL_7B = MistralConfig(vocab_size=32000, sliding_window=None, tie_word_embeddings=False)


def ids(count: int, first: int) -> np.ndarray:
    return (np.arange(count, dtype=np.int32) + first) % 7


def test_live_memory_peaks_where_torch_s_tracker_does() -> None:
    batch = pack_shared([Group("", ids(20, 0), {"real": (ids(30, 1),), "generated": (ids(25, 2),)})])
    found = []
    for tracker in (LiveMemory(), MemTracker()):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"), tracker:
            policy = Unprobed(AutoModelForCausalLM.from_config(with_layers(SMALL, 2), dtype=torch.float32))
            optimizer = torch.optim.AdamW(policy.parameters(), foreach=False)
            policy(batch).sum().backward()
            optimizer.step()
        peak = tracker.peak if isinstance(tracker, LiveMemory) else tracker.get_tracker_snapshot("peak")[CPU]["Total"]
        found.append(peak)
    assert found[0] == pytest.approx(found[1], rel=0.002) and found[0] > 10**6


@pytest.mark.parametrize(
    ("optimizer", "adapter", "checkpointing"),
    [("rmsprop", None, False), ("adamw", None, True), ("adamw_8bit", None, False), ("adamw", {"r": 4}, True)],
)
def test_fake_tensors_take_what_a_real_step_takes(
    optimizer: str, adapter: dict[str, object] | None, checkpointing: bool, make_recipe: MakeRecipe, tiny: Path
) -> None:
    """Of the tensors of a real step: loaded weights, our own loop over micro-batches, clipping, an update."""
    if optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    train = {"gradient_checkpointing": checkpointing, "optimizer": optimizer}
    recipe, tokens = make_recipe("spin", adapter=adapter, train=train), 400
    one = TrainingExample(
        Group("", ids(100, 0), {"real": (ids(150, 1),), "generated": (ids(150, 2),)}),
        {"real": np.zeros((), dtype=np.float32), "generated": np.zeros(1, dtype=np.float32)},
    )
    here = SingleProcess(device=CPU)
    with LiveMemory() as memory:
        model = load_model(tiny / "model", dtype=torch.float32, device=CPU)
        policy = make_policy(model, recipe, 0, here, Scorer)
        for _ in range(2):
            memory.restart()
            forward_backward(policy, recipe.method, [one, one], tokens, 0.0, here)
            here.optimizer_step(policy.forward, policy.optimizer, 1.0)
    expected = peak_bytes(recipe, load_config(tiny / "model"), tokens, "cpu")
    assert expected == pytest.approx(memory.peak, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {"train": {"dtype": "bfloat16"}}),
        (1, {"train": {"dtype": "bfloat16", "gradient_checkpointing": True}, "adapter": {"r": 4}}),
        (8, {"train": {"dtype": "bfloat16", "gradient_checkpointing": True}}),
    ],
)
def test_few_layers_tell_the_memory_of_many(ranks: int, settings: dict[str, object], make_recipe: MakeRecipe) -> None:
    recipe = make_recipe("spin", **settings)
    every = max(phase_peaks(recipe, SMALL, 512, "cuda", ranks).values())
    assert peak_bytes(recipe, SMALL, 512, "cuda", ranks) == pytest.approx(every, rel=0.01)


def test_layers_of_several_kinds_are_traced_in_whole_periods() -> None:
    hybrid = Qwen3NextConfig(num_hidden_layers=8)
    assert layer_period(hybrid) == 4 and layer_period(SMALL) == 1
    assert with_layers(hybrid, 5).layer_types == hybrid.layer_types[:5]
    assert hybrid.num_hidden_layers == 8, "the original stays as it is"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "bound"), [(8, 16.0), (64, 18.0)])
def test_7b_on_fake_ranks(ranks: int, bound: float, make_recipe: MakeRecipe) -> None:
    """Full fine-tuning of Mistral 7B with FSDP2, through the project's own `prepare`, 4,096 tokens on each rank."""
    recipe = make_recipe("spin", train={"dtype": "bfloat16", "gradient_checkpointing": True})
    peak = peak_bytes(recipe, MISTRAL_7B, 4096, "cuda", ranks) / GIB
    state = 7.24e9 * 12 / ranks / GIB
    assert state < peak < bound
