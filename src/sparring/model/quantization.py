"""A frozen base in 4 bits, through bitsandbytes: NF4 whose constants are quantized too, as in QLoRA (arXiv 2305.14314).

What is quantized are the linear layers but the output head. Sampling, scoring and training dequantize the same codes
to the same numbers, so the proof before the first step holds as it does for whole weights.
"""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.logging import set_verbosity_error

from sparring.errors import UserError

BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Half a byte, one byte of scale per block of 64, four bytes of scale per 256 blocks."""


def import_bitsandbytes() -> None:
    """Imports it, where it is installed, without what its import does of its own accord.

    On CPUs with bfloat16 products that is to fetch a kernel from the hub and run it, if `kernels` is installed.
    peft imports bitsandbytes wherever it finds it, so this comes before any import of peft.
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.ERROR)  # it would warn that it found no `kernels`
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = cast(Any, None)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden


def require_4bit(device: torch.device) -> None:
    """Refuses where bitsandbytes is not installed, or has no 4-bit kernel for this device: it is tried."""
    other = "or leave adapter.load_in_4bit out: the base is then kept in train.dtype, four times as large"
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "adapter.load_in_4bit: bitsandbytes is not installed; pip install 'sparring[4bit]' (it runs on NVIDIA, "
            f"AMD and Intel GPUs and on x86 CPUs), {other}"
        )
    try:
        import_bitsandbytes()
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4", compress_statistics=True)
        dequantize_4bit(packed, state)
    except Exception as error:  # libraries that lack a symbol, drivers that are too old: whatever it is
        raise UserError(
            f"adapter.load_in_4bit: bitsandbytes does not run on {device}: {type(error).__name__}: {error}. "
            f"Use a device that it supports, {other}"
        ) from error


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def compute_as_in_training(model: PreTrainedModel) -> None:
    """Has every quantized layer compute in evaluation as it does in training.

    On CPUs with bfloat16 products bitsandbytes would round the scales to bfloat16 once a layer is used outside of
    training, for good, so that the opponent that was sampled and scored were another model than the one that is
    trained; and it fails for layers whose width 32 does not divide.
    """
    for module in quantized_layers(model).values():
        module.support_avx512bf16_for_cpu = False


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    from bitsandbytes.nn.modules import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def dequantize(model: PreTrainedModel) -> None:
    """Puts plain float32 layers in place of the quantized ones, with exactly the numbers that those compute with."""
    set_verbosity_error()  # that a model is dequantized is what is asked for
    cast(Any, model).dequantize(dtype=torch.float32)
    nn.Module.to(model, torch.float32)
