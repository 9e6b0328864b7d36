"""Attention over shared prompts: each response attends to its prompt and itself, and to nothing else in the row.

A packed row holds prompt, response, response, ..., prompt, response, ... Each prompt attends to itself once, and each
response to its prompt and itself, in separate calls of torch's attention, so nothing masked is computed. On a GPU one
call of FlexAttention covers the row (`flex.py`), and the pieces are its fallback and its readable twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sparring.logging import info
from sparring.model import flex


class CannotSharePrompts(Exception):
    """A model's attention needs something that shared prompts do not give. The message says what."""


NAME = "sparring"
"""The attention implementation that a model is set to. Without `shared_prompts` it is torch's SDPA."""

IGNORED = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "output_attentions", "output_router_logits"})
"""Arguments of transformers' attention functions that shared prompts may leave out. Dropout is 0."""

QUERIES = 256
"""Queries per call for a long response: fewer masked scores are computed. Measured on CPU: a fifth less attention time
at 800 tokens, a third less at 1,600, and no difference below."""


@dataclass(frozen=True)
class SharedPrompts:
    """The groups of a packed row: in order, the number of tokens of each prompt and of its responses."""

    sizes: tuple[tuple[int, ...], ...]
    in_pieces: bool = False  # without FlexAttention, on a GPU too
    masks: dict[tuple[int, int, int], Bool[Tensor, "queries keys"]] = field(default_factory=dict)  # built once per row
    block_masks: dict[int, BlockMask] = field(default_factory=dict)  # built once per row and window

    def mask(self, queries: int, keys: int, window: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
        """Which keys each of the last `queries` positions attends to: up to `window`, its own the last."""
        window = min(window, keys)
        if (queries, keys, window) not in self.masks:
            before = keys - queries
            visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
            self.masks[queries, keys, window] = visible.triu(before - window + 1)
        return self.masks[queries, keys, window]

    def block_mask(self, window: int, device: torch.device) -> BlockMask:
        """Which positions of the whole row each position attends to, in blocks."""
        if window not in self.block_masks:
            self.block_masks[window] = flex.block_mask(self.sizes, window, device)
        return self.block_masks[window]


def attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads time width"],
    key: Float[Tensor, "rows kv_heads keys width"],
    value: Float[Tensor, "rows kv_heads keys value_width"],
    attention_mask: Tensor | None,
    *,
    shared_prompts: SharedPrompts | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "rows time heads value_width"], None]:
    """With the signature of transformers' attention functions.

    Raises `CannotSharePrompts` for what would change attention and is not implemented here: sinks, biases, indices,
    masks that a model computes itself.
    """
    if shared_prompts is None:
        settings = {"scaling": scaling, "sliding_window": sliding_window, **rest}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[return-value]
    if unknown := sorted(name for name, value in rest.items() if value is not None and name not in IGNORED):
        raise CannotSharePrompts(f"its attention takes {', '.join(unknown)}, which shared prompts do not have")
    if attention_mask is not None and attention_mask.numel() != 1:
        raise CannotSharePrompts("it computes an attention mask of its own")
    window = sliding_window or query.shape[2]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    dtype, device = _dtype(query), query.device
    shape = query.shape[1], key.shape[1], query.shape[3], value.shape[3]
    options = None if shared_prompts.in_pieces else flex_options(*shape, scale, dtype, device)
    if options is None:
        return by_pieces(query, key, value, shared_prompts, window, scale), None
    states = (x.to(dtype) for x in (query, key, value))
    mask = shared_prompts.block_mask(window, device)
    settings = {"scale": scale, "enable_gqa": True, "kernel_options": options}
    return flex.compiled(device)(*states, block_mask=mask, **settings).transpose(1, 2), None


PROBE = ((400, 150, 90), (90, 70))
"""Groups of the row that FlexAttention is tried on. Seven blocks: torch compiles once more for other rows if their
number in the first row equals another dimension, and no model has seven heads."""
PROBE_ERROR = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
"""Norm of the error over the norm, far above rounding and far below that of any wrong mask."""


@cache
def flex_options(
    heads: int, kv_heads: int, width: int, value_width: int, scale: float, dtype: torch.dtype, device: torch.device
) -> dict[str, Any] | None:
    """The options with which FlexAttention computes heads of this shape, or None if `by_pieces` does.

    Tried out once, forward and backward, with the first row: only then is the model sharded and on its device, and
    only compiling shows what a device's shared memory holds.
    """
    if not flex.is_compiled(device):
        return None
    reason = "Triton is not installed" if find_spec("triton") is None else ""
    for options in () if reason else flex.kernel_options(max(width, value_width), dtype):
        try:
            error = _probe(heads, kv_heads, width, value_width, scale, dtype, device, options)
            if error <= PROBE_ERROR[dtype]:
                return options
            reason = f"it differs from plain attention by {error:.2g}"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a compiler raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    info(
        f"note: FlexAttention is off for {heads} heads of {width} in {str(dtype)[6:]}: {reason}. Attention runs in "
        "pieces, which is slower."
    )
    return None


def _probe(
    heads: int,
    kv_heads: int,
    width: int,
    value_width: int,
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
    options: dict[str, Any],
) -> float:
    """The largest relative error of FlexAttention's values and gradients against `by_pieces` in float32."""
    row = SharedPrompts(PROBE)
    time = sum(map(sum, PROBE))
    random = torch.Generator().manual_seed(0)
    sizes = ((heads, width), (kv_heads, width), (kv_heads, value_width), (heads, value_width))
    states = [torch.randn(1, count, time, size, generator=random).to(device, dtype) for count, size in sizes]
    # a checkpoint around the caller must neither keep nor recompute what is saved here
    with torch.enable_grad(), saved_tensors_hooks(lambda x: x, lambda x: x):
        *inputs, outer = (x.detach().requires_grad_() for x in states)
        settings = {"scale": scale, "enable_gqa": True, "kernel_options": options}
        found = flex.compiled(device)(*inputs, block_mask=row.block_mask(time, device), **settings)
        with torch.autocast(device.type, enabled=False):
            ours = [found.detach(), *torch.autograd.grad(found, inputs, outer)]
            query, key, value = exact = [x.detach().float().requires_grad_() for x in inputs]
            expected = by_pieces(query, key, value, row, time, scale).transpose(1, 2)
            theirs = [expected.detach(), *torch.autograd.grad(expected, exact, outer.float())]
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def by_pieces(
    query: Float[Tensor, "1 heads time width"],
    key: Float[Tensor, "1 kv_heads time width"],
    value: Float[Tensor, "1 kv_heads time value_width"],
    shared_prompts: SharedPrompts,
    window: int,
    scale: float,
) -> Float[Tensor, "1 time heads value_width"]:
    """One call of torch's attention for each prompt, and for each QUERIES positions of each response."""
    settings = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = k.shape[2] - q.shape[2]
        if before == 0 and k.shape[2] <= window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, **settings).transpose(1, 2)
        parts, end = [], before
        for piece in q.split(QUERIES, dim=2):
            end += piece.shape[2]
            mask = shared_prompts.mask(piece.shape[2], end, window, q.device)
            parts.append(F.scaled_dot_product_attention(piece, k[:, :, :end], v[:, :, :end], mask, **settings))
        return torch.cat(parts, dim=2).transpose(1, 2)

    # split, not slices: the gradient of a slice is as large as the row
    sizes = [size for group in shared_prompts.sizes for size in group]
    parts = zip(*(x.split(sizes, dim=2) for x in (query, key, value)), strict=True)
    attended = []
    for group in shared_prompts.sizes:
        q, prompt_k, prompt_v = next(parts)
        attended.append(attend(q, prompt_k, prompt_v))
        for _ in group[1:]:
            q, k, v = next(parts)
            attended.append(attend(q, torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)))
    return torch.cat(attended, dim=1)


@contextmanager
def narrow_windows(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Sets every sliding window of a model to `window` tokens, so that a short probe reaches beyond it."""
    owners: dict[int, Any] = {
        id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", None))
    }
    before = [(owner, size) for owner in owners.values() if (size := _window(owner))]
    try:
        for owner, _ in before:
            owner.sliding_window = window
        yield
    finally:
        for owner, size in before:
            owner.sliding_window = size


def _window(owner: Any) -> int | None:
    size = getattr(owner, "sliding_window", None)
    return size if isinstance(size, int) else None


def _dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Why this architecture cannot share prompts, by its config; None if nothing there rules it out."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"its layers of type {', '.join(sorted(kinds))} process a row from start to end"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "it caps attention logits, which torch's SDPA cannot do"
    if not model.is_backend_compatible():
        return "transformers cannot replace its attention"
    return None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
