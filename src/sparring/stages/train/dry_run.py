"""The memory of a training step, measured on fake tensors: the project's own step, without weights or a device.

A model of few layers is traced twice, and what the layers between add is extrapolated: every layer that is alike adds
the same to each phase of a step. Takes seconds where a trace of all layers takes half a minute (benchmarks/forecast.py
compares the two).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sparring.model import attention
from sparring.model.attention import SharedPrompts
from sparring.model.kernels import chunked
from sparring.model.live_memory import LiveMemory
from sparring.model.load import turn_dropout_off
from sparring.model.logprobs import Scorer
from sparring.model.lora import train_adapter
from sparring.model.optimizers import optimizer_state_bytes, trained_sizes
from sparring.model.packing import Packing, pack
from sparring.parallel import Parallel, SingleProcess
from sparring.parallel.fake_ranks import fake_fsdp2
from sparring.recipe.schema import Recipe
from sparring.stages.train.policy import Policy, make_policy
from sparring.stages.train.step import backward_micro_batch, stack_opponent
from sparring.types import Group, Role, TrainingExample

Phase = Literal["forward", "backward", "update"]
"""Parts of a step whose peaks grow by different amounts per layer. "forward" ends where the backward pass reaches the
first layer: until then each layer keeps what it needs, afterwards none does."""


def peak_bytes(recipe: Recipe, config: PreTrainedConfig, tokens: int, device: str, ranks: int = 1) -> int:
    """Bytes of tensors on one device at the peak of an optimizer step, with micro-batches of `tokens` tokens.

    `device`: the type of the device that trains. `ranks`: how many of them shard the model. Raises what transformers
    and torch raise for an architecture that fake tensors cannot follow.
    """
    layers, period = config.get_text_config().num_hidden_layers, layer_period(config)
    # the layers at both ends of the backward pass differ: the first has none before it to gather, and with shards the
    # gradients of one are still being reduced while the next computes
    few = period + (1 if ranks == 1 else 2)
    if layers <= few + period:
        return max(phase_peaks(recipe, config, tokens, device, ranks).values())
    low, high = (
        phase_peaks(recipe, with_layers(config, depth), tokens, device, ranks) for depth in (few, few + period)
    )
    return max(low[phase] + (high[phase] - low[phase]) * (layers - few) // period for phase in low)


def phase_peaks(recipe: Recipe, config: PreTrainedConfig, tokens: int, device: str, ranks: int = 1) -> dict[Phase, int]:
    """The peak of each phase of a step, with gradients of earlier micro-batches and the optimizer's state in place."""
    with _parallel(ranks, getattr(torch, recipe.train.dtype)) as parallel, _quiet():
        mode, memory = FakeTensorMode(allow_non_fake_inputs=True), LiveMemory()
        with mode, memory:
            stand_in = _with_torch_s_optimizer(recipe) if recipe.train.optimizer == "adamw_8bit" else recipe
            policy = make_policy(_fake_model(recipe, config), stand_in, 0, parallel, Unprobed)
            trained = [parameter for parameter in policy.forward.parameters() if parameter.requires_grad]
            # accelerate looks an optimizer's parameters up by their addresses, and those of fake tensors are all 0
            parallel.unwrap(policy.optimizer).param_groups[0]["params"] = trained
        one = _example(recipe, tokens, policy.scorer.packing)
        packed, opponent = pack(policy.scorer.packing, [one.group]), stack_opponent([one], parallel.device)
        if device == "cuda" and packed.shared_prompts is not None:
            packed = replace(packed, shared_prompts=SharedPrompts(((packed.input_ids.shape[1],),)))
        peaks: dict[Phase, int] = {}
        with mode, memory, patch.object(chunked, "rows_for", lambda device: _NoRows):
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            _update(policy, recipe)
            memory.restart()
            in_cpu_memory = memory.live if recipe.parallel == "fsdp2_offload" and parallel.is_sharded else 0
            with _on_reaching_first_layer(policy.model, lambda: peaks.update({"forward": memory.restart()})):
                backward_micro_batch(policy, recipe.method, packed, opponent, recipe.train.sft_weight, 1.0, parallel)
            peaks["backward"] = memory.restart()
            _update(policy, recipe)
            peaks["update"] = memory.restart()
    if in_cpu_memory:  # shards, their gradients and their state; and the update is computed there
        peaks = {phase: peak - in_cpu_memory for phase, peak in peaks.items() if phase != "update"}
    return peaks


class Unprobed(Scorer):
    """A scorer that compares no numbers when it is made: fake tensors have none."""

    def check_head(self) -> None:
        pass

    def share_prompts(self) -> None:
        self.model.set_attn_implementation(attention.NAME)
        self.packing = "shared"


def layer_period(config: PreTrainedConfig) -> int:
    """After how many layers their kinds repeat. Full and sliding attention keep the same tensors."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    if set(kinds) <= {"full_attention", "sliding_attention"}:
        return 1
    return next((p for p in range(1, len(kinds)) if kinds[p:] == kinds[:-p]), len(kinds))


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same architecture with its first `layers` layers."""
    short = deepcopy(config)
    text = short.get_text_config()
    before = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return short


def _fake_model(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    """On the CPU, for the fake mode that is on. peft cannot convert fake tensors, so the adapter is added before."""
    config = deepcopy(config)
    turn_dropout_off(config)
    with unset_fake_temporarily(), torch.device("meta"):
        dtype = getattr(torch, recipe.weights_dtype)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if recipe.adapter is not None:
            train_adapter(model, recipe.adapter.for_peft(), 0)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model.eval()


class _NoRows:
    """In place of the head's row kernels, which take no memory: on a CPU they work in thousands of small strips."""

    @staticmethod
    def logprobs_of(logits: Tensor, targets: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return torch.empty(targets.shape, dtype=dtype), torch.empty(len(logits), dtype=dtype)

    @staticmethod
    def slopes_(*_: object) -> None:
        pass


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and accelerate warn about addresses of fake tensors
        yield


def _parallel(ranks: int, dtype: torch.dtype) -> AbstractContextManager[Parallel]:
    return fake_fsdp2(ranks, dtype) if ranks > 1 else nullcontext(SingleProcess(device=torch.device("cpu")))


def _example(recipe: Recipe, tokens: int, packing: Packing) -> TrainingExample:
    """A group that fills a micro-batch, three quarters of it responses."""
    needs, samples = recipe.method.needs, recipe.generate.samples
    counts: dict[Role, int] = {role: samples if role == "generated" else 1 for role in needs.roles}
    number = sum(counts.values())
    of_response = max(1, 3 * tokens // (4 * number))
    of_prompt = max(1, (tokens // number if packing == "padded" else tokens - (number - 1) * of_response) - of_response)
    ids = iter(range(1, number + 1))  # equal responses would be computed once
    responses: dict[Role, tuple[np.ndarray, ...]] = {
        role: tuple(np.full(of_response, next(ids), dtype=np.int32) for _ in range(n)) for role, n in counts.items()
    }
    opponent: dict[Role, np.ndarray] = {
        role: np.zeros(n if role == "generated" else (), dtype=np.float32) for role, n in counts.items()
    }
    group = Group("", np.zeros(of_prompt, dtype=np.int32), responses)
    if needs.teacher is not None:
        candidates = np.zeros((samples, of_response, needs.teacher.candidates), dtype=np.int32)
        group = replace(group, candidates={"generated": tuple(candidates)})
        opponent = {"generated": np.zeros((samples, of_response, 1 + needs.teacher.candidates), dtype=np.float32)}
    return TrainingExample(group, opponent if needs.opponent else {})


@contextmanager
def _on_reaching_first_layer(model: PreTrainedModel, call: Callable[[], object]) -> Iterator[None]:
    """Calls `call` when the backward pass of the block reaches the first layer."""
    blocks = set(model._no_split_modules or ())
    # FSDP2 makes a subclass of every layer's class
    layers = (module for module in model.modules() if blocks & {kind.__name__ for kind in type(module).__mro__})
    first = next(layers, None)

    def watch(_: nn.Module, __: object, output: Any) -> None:
        handle.remove()  # with checkpointing the layer runs again in the backward pass
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: call() and None)

    if first is None:
        yield
        return
    handle = first.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def _with_torch_s_optimizer(recipe: Recipe) -> Recipe:
    """bitsandbytes' optimizers take no fake tensors. `_update` makes their state in place of another's."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"optimizer": "rmsprop"})})


def _update(policy: Policy, recipe: Recipe) -> None:
    """One update. Kernels of bitsandbytes make no temporaries: of those only the state is made."""
    if recipe.train.optimizer != "adamw_8bit":
        policy.optimizer.step()
    elif not policy.optimizer.state:
        size = optimizer_state_bytes(recipe.train.optimizer, *trained_sizes(policy.model))
        moments = torch.empty(size, dtype=torch.uint8)
        policy.optimizer.state[moments] = {"moments": moments}
