"""What the processor can do, before anything is loaded on it."""

from __future__ import annotations

from functools import cache

import torch


@cache
def has_bfloat16_products() -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    A CPU without AVX-512-BF16, AMX or Arm's equal computes bfloat16 in float32 after conversions: slower than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def resolve_dtype(dtype: str) -> str:
    """`auto` is bfloat16 where that is the faster one."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if has_bfloat16_products() else "float32"
