"""Attention over shared prompts: the responses of a group see their prompt and themselves, nothing else.

A packed row holds prompt, response, response, ..., prompt, response, ... Each prompt attends to itself once,
and each response to its prompt and itself, as calls of torch's attention of their own: no work is spent on
what a mask would hide. On a GPU that has Triton, one call of FlexAttention does the row, and skips the blocks that
its mask hides. (It has no backward pass on CPU. Its forward pass is compared there; it was not run on a GPU yet.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sparring"
"""The attention implementation a model is set to. Where no `shared_prompts` are passed it is torch's, as ever."""

QUERIES = 256
"""Positions of a response that are attended at a time, so that what a mask hides is a small share of what is computed:
measured on CPU, a fifth off the attention of 800 tokens and a third off that of 1,600, and nothing lost below."""

PIECE = 2**19
"""Attention weights of a piece in the backward pass on CPU, all heads together: 2 MiB of float32."""


@dataclass(frozen=True)
class SharedPrompts:
    """Where the groups of a packed row lie: in order, the tokens of each prompt and of its responses."""

    sizes: tuple[tuple[int, ...], ...]
    is_flex: bool = False  # by FlexAttention
    masks: dict[tuple[int, int, int], Bool[Tensor, "queries keys"]] = field(default_factory=dict)  # made once per row
    block_masks: dict[int, BlockMask] = field(default_factory=dict)  # likewise, by window

    def mask(self, queries: int, keys: int, window: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
        """Which keys each of the last `queries` positions sees: at most `window`, the last its own."""
        window = min(window, keys)
        if (queries, keys, window) not in self.masks:
            before = keys - queries
            visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
            self.masks[queries, keys, window] = visible.triu(before - window + 1)
        return self.masks[queries, keys, window]

    def block_mask(self, window: int, device: torch.device) -> BlockMask:
        """Which positions of the whole row each position sees, in blocks."""
        if window not in self.block_masks:
            # for each position of the row: its group, its response (0: the prompt), its place after the prompt's start
            rows = [
                (group, response, place)
                for group, (prompt, *sizes) in enumerate(self.sizes)
                for response, (before, size) in enumerate([(0, prompt), *((prompt, size) for size in sizes)])
                for place in range(before, before + size)
            ]
            group, response, place = torch.tensor(rows, device=device).unbind(1)

            self.block_masks[window] = create_block_mask(
                lambda _, __, q, k: (
                    (group[q] == group[k])
                    & ((response[k] == 0) | (response[q] == response[k]))
                    & (place[k] <= place[q])
                    & (place[q] - place[k] < window)
                ),
                *(None, None, len(rows), len(rows)),
                device=device.type,
            )
        return self.block_masks[window]


def attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads time width"],
    key: Float[Tensor, "rows kv_heads keys width"],
    value: Float[Tensor, "rows kv_heads keys width"],
    attention_mask: Tensor | None,
    *,
    shared_prompts: SharedPrompts | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "rows time heads width"], None]:
    """The signature is transformers'. Dropout is refused at loading: a policy that drops is not its opponent."""
    if shared_prompts is None:
        settings = {"scaling": scaling, "sliding_window": sliding_window, **rest}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)  # type: ignore[return-value]
    window = sliding_window or query.shape[2]
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    if shared_prompts.is_flex:
        dtype = _dtype(query)
        states = (x.to(dtype) for x in (query, key, value))
        mask = shared_prompts.block_mask(window, query.device)
        return flex(query.device)(*states, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2), None
    if (dtype := _dtype(query)) == torch.bfloat16 and query.device.type == "cpu":
        states = (x.to(dtype) for x in (query, key, value))
        return _PiecesInBackward.apply(*states, shared_prompts, window, scale), None  # type: ignore[return-value]
    return by_pieces(query, key, value, shared_prompts, window, scale), None


@cache
def flex(device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention, compiled on a GPU, for any length: compiling anew for each would take longer than it saves."""
    return torch.compile(flex_attention, dynamic=True) if device.type == "cuda" else flex_attention  # type: ignore[return-value]


def by_pieces(
    query: Float[Tensor, "1 heads time width"],
    key: Float[Tensor, "1 kv_heads time width"],
    value: Float[Tensor, "1 kv_heads time width"],
    shared_prompts: SharedPrompts,
    window: int,
    scale: float,
) -> Float[Tensor, "1 time heads width"]:
    """A call of torch's attention for each prompt, and for each piece of each response."""
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


class _PiecesInBackward(torch.autograd.Function):
    """`by_pieces`, with a backward pass of plain products over pieces that fit a CPU's cache.

    In bfloat16 torch's own backward pass for CPUs reaches a fifth of what products reach; this one takes half its time.
    (In float32 torch's is the faster one.)
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, shared: SharedPrompts, window: int, scale: float
    ) -> Tensor:
        out = by_pieces(query, key, value, shared, window, scale)
        ctx.save_for_backward(query, key, value, out)
        ctx.settings = shared, window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *states, out = ctx.saved_tensors
        shared, window, scale = ctx.settings
        query, key, value = (x[0] for x in states)
        heads, _, width = query.shape
        sharing = heads // len(key)  # query heads of a key-value head
        # d softmax needs sum(p * dp) of each query, which is the product of what came out and its gradient
        inner = (gradient[0].float() * out[0].float()).sum(-1).T  # [heads, time]
        outer = gradient[0].transpose(0, 1)
        for_query = torch.empty_like(query)
        for_key, for_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))

        def by_head(x: Tensor) -> Tensor:
            """[heads, queries, ...] to [kv_heads, heads of each * queries, ...]"""
            return x.reshape(len(key), sharing * x.shape[1], *x.shape[2:])

        for prompt, own in _responses(shared):
            keys, values = (torch.cat([x[:, prompt], x[:, own]], dim=1) for x in (key, value))
            key_slopes, value_slopes = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
            before = prompt.stop - prompt.start
            rows = max(32, PIECE // (heads * keys.shape[1]))
            for start in range(own.start, own.stop, rows):
                piece = slice(start, min(start + rows, own.stop))
                count, end = piece.stop - start, before + piece.stop - own.start
                seen = slice(max(0, end - count + 1 - window), end)
                q, g = by_head(query[:, piece]), by_head(outer[:, piece])
                k, v = keys[:, seen], values[:, seen]
                weights = (q @ k.transpose(1, 2)).float().mul_(scale).view(heads, count, -1)
                mask = shared.mask(count, end, window, q.device)[:, seen]
                hidden = mask.shape[1] if window < end else count  # only the last keys are hidden, without a window
                weights[..., -hidden:].masked_fill_(~mask[:, -hidden:], -math.inf)
                weights = by_head(weights.softmax(-1))
                slopes = (g @ v.transpose(1, 2)).float()
                slopes = slopes.sub_(by_head(inner[:, piece])[..., None]).mul_(weights).mul_(scale).to(q.dtype)
                for_query[:, piece] = (slopes @ k).view(heads, count, width)
                key_slopes[:, seen] += slopes.transpose(1, 2) @ q
                value_slopes[:, seen] += weights.to(q.dtype).transpose(1, 2) @ g
            for whole, part in ((for_key, key_slopes), (for_value, value_slopes)):
                whole[:, prompt] += part[:, :before]
                whole[:, own] += part[:, before:]
        found = (for_query, for_key.to(key.dtype), for_value.to(value.dtype))
        return *(x[None] for x in found), None, None, None


def _responses(shared: SharedPrompts) -> Iterator[tuple[slice, slice]]:
    """Where the shared part and the own part of each prompt and each response lie. A prompt shares nothing."""
    start = 0
    for prompt, *responses in shared.sizes:
        yield slice(start, start), slice(start, start + prompt)
        at = start + prompt
        for size in responses:
            yield slice(start, start + prompt), slice(at, at + size)
            at += size
        start = at


def _dtype(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


def why_not_shared(model: PreTrainedModel) -> str | None:
    """The named rules: what a model's config says that makes it unable to share a prompt. None: nothing does."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"layers of kind {', '.join(sorted(kinds))} read a row from its start to its end"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention logits are capped, which torch's attention cannot do"
    if not model.is_backend_compatible():
        return "transformers cannot exchange its attention"
    return None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
