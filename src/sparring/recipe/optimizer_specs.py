"""The optimizers that a recipe can name, and what their moments take.

Every command reads a recipe, so this imports neither torch nor transformers.

`rmsprop` and `adamw` are torch's. The others are bitsandbytes', under the names that transformers has for them: moments
in 8 bits by blocks of 256 numbers (Dettmers et al., arXiv 2110.02861), and paged ones, which the driver moves to the
machine's memory where the GPU's runs short.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

BLOCK = 256
"""Numbers that share a scale of four bytes."""
LEAST_8BIT = 4096
"""Smaller tensors keep their moments in 32 bits."""
LEAST_PAGED = 100_000
"""Smaller tensors stay on the device."""

Name = Literal["rmsprop", "adamw", "rmsprop_bnb_8bit", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]


@dataclass(frozen=True)
class Kind:
    moments: int
    ours: str | None = None  # the name of bitsandbytes' class; None: torch's own optimizer
    is_8bit: bool = False
    is_paged: bool = False


KINDS: Mapping[str, Kind] = {
    "rmsprop": Kind(1),
    "adamw": Kind(2),
    "rmsprop_bnb_8bit": Kind(1, "RMSprop8bit", is_8bit=True),
    "adamw_8bit": Kind(2, "AdamW8bit", is_8bit=True),
    "paged_adamw_8bit": Kind(2, "PagedAdamW8bit", is_8bit=True, is_paged=True),
    "paged_adamw_32bit": Kind(2, "PagedAdamW32bit", is_paged=True),
}


def moment_bytes(name: str, sizes: Iterable[int], embedding: int = 0) -> tuple[int, int]:
    """Of tensors with so many numbers: bytes on the device, and bytes that may lie in the machine's memory.

    `embedding`: numbers of the embeddings, which are not among `sizes`.
    """
    kind, here, paged = KINDS[name], 0, 0
    for size, can_be_8bit in ((embedding, False), *((size, True) for size in sizes)):
        is_8bit = kind.is_8bit and can_be_8bit and size >= LEAST_8BIT
        scales = kind.moments * 4 * -(-size // BLOCK) if is_8bit else 0
        moments = kind.moments * size * (1 if is_8bit else 4)
        if kind.is_paged and size >= LEAST_PAGED:
            here, paged = here + scales, paged + moments
        else:
            here += scales + moments
    return here, paged
