"""Loading and saving a causal language model and its tokenizer. safetensors only, no remote code."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar

from sparring.errors import UserError
from sparring.model.lora import base_of, has_adapter, is_adapter, load_adapter, merge_adapter, save_adapter
from sparring.model.quantization import compute_as_in_training, dequantize, nf4, require_4bit
from sparring.types import Generation

disable_progress_bar()  # sparring shows its own

USAGE_FILES = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
)
"""How a model is used: tokenizer, chat template, generation defaults."""

# what transformers and the libraries below it raise for broken model folders
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
DOWNLOAD_AGAIN = "Download or export the model again."

IMPLEMENTATION = re.compile("implementation|kernel_config")

WEIGHTS_THAT_RUN_CODE = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def resolve_model(name: str) -> Path:
    """A local folder, or the downloaded snapshot of a hub id with an optional @revision.

    The snapshot's folder is named by its commit, so the recorded path is the exact version.
    """
    folder = Path(name).resolve()
    if folder.exists():
        return check_model_folder(folder)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"model: there is no folder {folder}. Relative paths start at the working directory.")
    repo, _, revision = name.partition("@")
    try:
        snapshot = Path(
            snapshot_download(
                repo,
                revision=revision or None,
                allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "*.txt"],
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"model: there is no folder {folder}, and the hub did not return '{name}': {error}. "
            "Without a network, pass the folder of a downloaded model. For a gated model, accept its license on "
            "its page and run 'hf auth login'."
        ) from error
    return check_model_folder(snapshot)


def check_model_folder(folder: Path) -> Path:
    if is_adapter(folder):
        raise UserError(f"model: {folder} is an adapter. Merge it first with 'sparring export RUN_DIR OUT --merge'.")
    if not (folder / "config.json").is_file():
        raise UserError(f"model: {folder} has no config.json, so it is not a transformers model folder")
    if not list(folder.glob("*.safetensors")):
        unsafe = sorted(f.name for pattern in WEIGHTS_THAT_RUN_CODE for f in folder.glob(pattern))
        found = f"; {unsafe[0]} can run code when it is read: convert it to safetensors first" if unsafe else ""
        raise UserError(f"model: {folder} has no *.safetensors{found}")
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
                if not isinstance(content, dict):
                    raise ValueError("it is not a mapping")
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"model: {folder / name} cannot be read: {error}. {DOWNLOAD_AGAIN}") from error
            refuse_unsafe_settings(folder / name, content)
            if name == "config.json" and content.get("quantization_config"):
                raise UserError(
                    f"model: the weights in {folder} are stored quantized; give the original weights, and "
                    "adapter.load_in_4bit: true to train an adapter on them in 4 bits"
                )
    return folder


def refuse_unsafe_settings(file: Path, content: object) -> None:
    """Refuses settings that would make a loader run remote code, or read files outside the model's folder.

    `trust_remote_code=False` alone was not enough for CVE-2026-4372 and CVE-2026-5241. `auto_map` is allowed: sparring
    ignores it, and transformers refuses a model that needs it.
    """
    if isinstance(content, list):
        for inner in content:
            refuse_unsafe_settings(file, inner)
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        is_kernel = IMPLEMENTATION.search(key) and "/" in json.dumps(value)
        is_file = key.endswith("_file") and isinstance(value, str) and Path(value).name != value
        if (key == "trust_remote_code" and value) or is_kernel or is_file:
            raise UserError(
                f"model: {file} sets {key} to {value!r}, which would run or read something outside the model. "
                "Remove the key if you trust the rest."
            )
        refuse_unsafe_settings(file, value)


def _short(error: Exception) -> str:
    text = str(error)
    return text if len(text) <= 500 else f"{text[:500]} [...]"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(base_of(folder), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a broken file
        raise UserError(
            f"model: the tokenizer in {folder} cannot be loaded: {_short(error)}. {DOWNLOAD_AGAIN}"
        ) from error


def load_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(base_of(folder), trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(
            f"model: {folder / 'config.json'} cannot be loaded: {_short(error)}. {DOWNLOAD_AGAIN}"
        ) from error


def load_model(
    folder: Path, *, dtype: torch.dtype | Literal["auto"], device: torch.device, in_4bit: bool = False
) -> PreTrainedModel:
    """The model in evaluation mode, with every dropout set to 0, so that policy and opponent agree exactly.

    From an adapter's folder: its base in `dtype` with the adapter, in float32, applied. With `in_4bit` the linear
    layers of the base are quantized while they are loaded, and compute in `dtype`.
    """
    config = load_config(folder)
    quantized: dict[str, Any] = {}
    if in_4bit:
        require_4bit(device)
        quantized = {"quantization_config": nf4(cast(torch.dtype, dtype)), "device_map": {"": device}}
    turn_dropout_off(config)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base_of(folder),
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **quantized,
        )
    except UNREADABLE as error:
        raise UserError(
            f"model: the weights in {folder} cannot be loaded: {_short(error)}. {DOWNLOAD_AGAIN}"
        ) from error
    model, info = cast(tuple[PreTrainedModel, dict[str, set[str]]], loaded)
    if lacking := sorted(info["missing_keys"]):  # transformers would initialize them randomly
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"model: the weights in {folder} lack {lacking[0]}{more}. {DOWNLOAD_AGAIN}")
    if in_4bit:
        compute_as_in_training(model)
    if is_adapter(folder):
        load_adapter(model, folder)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(f"model: {name} in {folder} contains values that are not finite. {DOWNLOAD_AGAIN}")
    torch.nn.Module.to(model, device)
    return model.eval()


def turn_dropout_off(config: PreTrainedConfig) -> None:
    """Sets every dropout to 0, those of nested configs (DBRX's `attn_config`) too."""
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            turn_dropout_off(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def check_weights(folder: Path) -> int:
    """Loads a model once, to refuse it before a run starts; returns the number of its token embeddings."""
    model = load_model(folder, dtype="auto", device=torch.device("cpu"))  # as it is stored
    return cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings


def num_parameters(folder: Path) -> int:
    """Parameters of a model folder, counted from the headers of its files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return total


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a plain model folder, as transformers does."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_successor(
    model: PreTrainedModel, origin: Path, folder: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Weights and config of a trained model, with copies of the files of `origin` that say how to use it.

    `state`: the gathered weights, if this rank's model is sharded. A model with an adapter saves the adapter only.
    Files are copied, not written again: transformers refuses to write some generation_config.json that models ship
    (a temperature without do_sample), and that must not cost a finished training.
    """
    if has_adapter(model):
        save_adapter(model, base_of(origin), folder, state)
        return
    model.generation_config = GenerationConfig()
    model.save_pretrained(folder, state_dict=None if state is None else dict(state))
    (folder / "generation_config.json").unlink(missing_ok=True)
    for pattern in USAGE_FILES:
        for file in sorted(f for f in origin.glob(pattern) if f.is_file()):
            shutil.copyfile(file, folder / file.name)


def save_merged(
    adapter: Path, folder: Path, *, dtype: torch.dtype = torch.float32, quantized_in: torch.dtype | None = None
) -> None:
    """Writes a plain model folder from an adapter and its base, merged in float32 and saved in `dtype`.

    `quantized_in`: the compute dtype of an adapter that was trained on its base in 4 bits. It is then merged into the
    dequantized base: with the original weights the result would be another model than the one that was trained.
    """
    base, cpu = base_of(adapter), torch.device("cpu")
    if quantized_in is None:
        model = load_model(base, dtype=torch.float32, device=cpu)
    else:
        dequantize(model := load_model(base, dtype=quantized_in, device=cpu, in_4bit=True))
    model = merge_adapter(model, adapter)
    torch.nn.Module.to(model, dtype)
    save_successor(model, base, folder)


def save_dequantized(base: Path, folder: Path, *, dtype: torch.dtype, device: torch.device) -> None:
    """Writes a plain model folder with exactly the numbers that the base, in 4 bits, computes with in `dtype`."""
    model = load_model(base, dtype=dtype, device=device, in_4bit=True)
    dequantize(model, dtype)
    save_successor(model, base, folder)


def declared_end_ids(folder: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The end tokens that the model's own files declare."""
    declared: set[int] = set()
    folder = base_of(folder)
    if (folder / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(folder).eos_token_id
        declared.update([eos] if isinstance(eos, int) else eos or [])
    if tokenizer.eos_token_id is not None:
        declared.add(cast(int, tokenizer.eos_token_id))
    return declared


def decode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Generation]) -> list[str]:
    """Responses as text, for people and checkers only: nothing is tokenized again."""
    return cast(list[str], tokenizer.batch_decode([a.token_ids.tolist() for a in answers], skip_special_tokens=True))


def context_length(folder: Path) -> int | None:
    """The model's context length in tokens; None if its config does not say.

    With LongRoPE it is the original one. Beyond it a model rotates all positions of a batch with other factors, so a
    response's log-prob would depend on the rows beside it.
    """
    config = load_config(folder).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]  # some have one for each layer type
    original = [k["original_max_position_embeddings"] for k in kinds if k.get("rope_type") == "longrope"]
    return min(filter(None, [getattr(config, "max_position_embeddings", None), *original]), default=None)
