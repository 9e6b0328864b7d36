"""Low-rank adapters (LoRA, rsLoRA, DoRA) through peft: a few MB per iteration beside a frozen base model.

A folder with an adapter_config.json loads like any model: its base with the adapter applied. The adapter is float32.
peft is imported where it is used, since that takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparring.errors import UserError
from sparring.model.quantization import import_bitsandbytes

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "base.json"
PREFIX = "base_model.model."  # what peft and vLLM write before a module's name
MARK = "lora_"  # in the name of every adapter parameter


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> Path:
    """The folder of an adapter's base model; any other folder is its own base."""
    if not is_adapter(folder):
        return folder
    base = Path(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"])
    if not base.is_dir():
        raise UserError(f"model: {folder} is an adapter of {base}, which does not exist. Restore that folder.")
    return base


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Applies the adapter of `folder`, frozen. Refuses a missing weight, of which peft would only warn."""
    import_bitsandbytes()
    from peft import PeftModel

    try:
        PeftModel.from_pretrained(cast(Any, model), folder)
        wrong = set(_weights(model)) ^ set(load_file(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model: the adapter in {folder} cannot be loaded: {error}") from error
    if wrong:
        raise UserError(f"model: {folder / WEIGHTS} does not match its base: {min(wrong)} is missing on one side.")
    model.requires_grad_(False)


def train_adapter(model: PreTrainedModel, settings: Mapping[str, object], seed: int) -> None:
    """Makes the adapter of a model, and nothing else, trainable.

    A model without an adapter gets a new one, which does not change outputs yet. `settings`: fields of LoraConfig.
    """
    import_bitsandbytes()
    from peft import LoraConfig, get_peft_model

    if not has_adapter(model):
        config = LoraConfig(task_type="CAUSAL_LM", **cast(Any, settings))
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            try:
                get_peft_model(model, config)
            except ValueError as error:
                raise UserError(f"adapter: {error}") from error
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            if any(MARK in name for name, _ in cast(nn.Module, module).named_parameters()):
                raise UserError(
                    "adapter.target_modules: adapters on the embeddings and the output head are not supported."
                )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name)


def has_adapter(model: PreTrainedModel) -> bool:
    return hasattr(model, "peft_config")


def save_adapter(model: PreTrainedModel, base: Path, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """The adapter alone, as peft writes it, naming its base. `state`: its weights, if not the model's."""
    config = cast(Any, model).peft_config["default"]
    config.base_model_name_or_path = str(base)
    config.target_modules = sorted(config.target_modules)  # a set, whose order differs between processes
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(_weights(model, state), folder / WEIGHTS, metadata={"format": "pt"})


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A plain model: `model` with the adapter of `folder` merged into its weights."""
    import_bitsandbytes()
    from peft import PeftModel

    return cast(Any, PeftModel.from_pretrained(cast(Any, model), folder)).merge_and_unload(safe_merge=True)


def _weights(model: PreTrainedModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, state_dict=cast(Any, state), save_embedding_layers=False)
    return {PREFIX + name: value.detach().cpu().contiguous() for name, value in found.items()}
