"""A frozen base model in 4 bits through bitsandbytes: NF4 with double quantization, as in QLoRA (arXiv 2305.14314).

Quantizes the linear layers except the output head. Sampling, scoring and training dequantize the same codes to the same
numbers, so the policy equals its opponent before the first step as it does without quantization.
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
    """Imports bitsandbytes, if it is installed, without the side effects of its import.

    On CPUs with bfloat16 instructions its import would fetch a kernel from the hub and run it, if `kernels` is
    installed. peft imports bitsandbytes wherever it finds it, so this must precede any import of peft.
    """
    if "bitsandbytes" in sys.modules or find_spec("bitsandbytes") is None:
        return
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.setLevel(logging.ERROR)  # it would warn that `kernels` is not installed
    hidden = sys.modules.get("kernels")
    sys.modules["kernels"] = cast(Any, None)
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del sys.modules["kernels"]
        if hidden is not None:
            sys.modules["kernels"] = hidden


def require_4bit(device: torch.device) -> None:
    """Refuses if bitsandbytes is not installed or has no 4-bit kernel for this device, after trying it."""
    other = "or remove adapter.load_in_4bit: the base is then kept in train.dtype, four times as large"
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "adapter.load_in_4bit: bitsandbytes is not installed. Run pip install 'sparring[4bit]' (for NVIDIA, "
            f"AMD and Intel GPUs and x86 CPUs), {other}."
        )
    try:
        import_bitsandbytes()
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4", compress_statistics=True)
        dequantize_4bit(packed, state)
    except Exception as error:  # libraries that lack a symbol, drivers that are too old: whatever it is
        raise UserError(
            f"adapter.load_in_4bit: bitsandbytes cannot run on {device}: {type(error).__name__}: {error}. "
            f"Use a device that it supports, {other}."
        ) from error


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def compute_as_in_training(model: PreTrainedModel) -> None:
    """Makes every quantized layer compute in evaluation as it does in training.

    On CPUs with bfloat16 instructions bitsandbytes rounds the scales to bfloat16, permanently, when a layer is used in
    evaluation: the opponent would differ from the policy that is trained. It also fails for widths that 32 does not
    divide.
    """
    for module in quantized_layers(model).values():
        module.support_avx512bf16_for_cpu = False


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    from bitsandbytes.nn.modules import Linear4bit

    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def dequantize(model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Replaces quantized layers with layers in `dtype`, at least as wide as the compute dtype.

    They hold exactly the numbers that the quantized layers compute with.
    """
    set_verbosity_error()  # transformers would warn that the model is dequantized, which is intended
    cast(Any, model).dequantize(dtype=dtype)
    nn.Module.to(model, dtype)
