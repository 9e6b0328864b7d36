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
"""Attention weights of a piece in bfloat16 on CPU, all heads together: 2 MiB of float32."""
LEAST_ROWS = 64
"""Queries of such a piece at least: with fewer, products are slow, so that fewer heads are taken together."""


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
    value: Float[Tensor, "rows kv_heads keys value_width"],
    attention_mask: Tensor | None,
    *,
    shared_prompts: SharedPrompts | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "rows time heads value_width"], None]:
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
        return _ByProducts.apply(*states, shared_prompts, window, scale), None  # type: ignore[return-value]
    return by_pieces(query, key, value, shared_prompts, window, scale), None


@cache
def flex(device: torch.device) -> Callable[..., Tensor]:
    """FlexAttention, compiled on a GPU, for any length: compiling anew for each would take longer than it saves."""
    return torch.compile(flex_attention, dynamic=True) if device.type == "cuda" else flex_attention  # type: ignore[return-value]


def by_pieces(
    query: Float[Tensor, "1 heads time width"],
    key: Float[Tensor, "1 kv_heads time width"],
    value: Float[Tensor, "1 kv_heads time value_width"],
    shared_prompts: SharedPrompts,
    window: int,
    scale: float,
) -> Float[Tensor, "1 time heads value_width"]:
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


@dataclass(frozen=True)
class _Piece:
    """Positions of a prompt or a response, and what they see: slices of the row, and of the heads."""

    heads: slice
    kv_heads: slice
    queries: slice
    prompt: slice
    own: slice

    @property
    def count(self) -> int:
        return self.queries.stop - self.queries.start

    def of_queries(self, x: Tensor) -> Tensor:
        """[heads, time, ...] to [its key-value heads, its heads of each and its queries, ...]"""
        kv_heads = self.kv_heads.stop - self.kv_heads.start
        return x[self.heads, self.queries].reshape(kv_heads, -1, *x.shape[2:])

    def of_keys(self, x: Tensor) -> Tensor:
        return torch.cat([x[self.kv_heads, self.prompt], x[self.kv_heads, self.own]], dim=1)


def _pieces(shared: SharedPrompts, heads: int, kv_heads: int, window: int) -> Iterator[_Piece]:
    """All positions of a row in pieces of about `PIECE` weights, of fewer heads at a time where many keys are seen."""
    sharing, start = heads // kv_heads, 0
    for prompt, *responses in shared.sizes:
        nothing, whole = slice(start, start), slice(start, start + prompt)
        for seen, size in ((nothing, prompt), *((whole, size) for size in responses)):
            before = seen.stop - seen.start
            together = min(kv_heads, max(1, PIECE // (LEAST_ROWS * sharing * (before + size))))
            rows = max(LEAST_ROWS, PIECE // (together * sharing * (before + size)))
            for kv_head in range(0, kv_heads, together):
                some = slice(kv_head, min(kv_head + together, kv_heads))
                for place in range(0, size, rows):
                    queries = slice(start + place, start + min(place + rows, size))
                    first = max(0, before + place + 1 - window)
                    yield _Piece(
                        slice(sharing * some.start, sharing * some.stop),
                        some,
                        queries,
                        slice(seen.start + min(first, before), seen.stop),
                        slice(start + max(0, first - before), queries.stop),
                    )
            start += size


def _weights(
    q: Float[Tensor, "kv_heads rows width"],
    k: Float[Tensor, "kv_heads keys width"],
    piece: _Piece,
    shared: SharedPrompts,
    window: int,
    scale: float,
) -> Float[Tensor, "kv_heads rows keys"]:
    """What each query gives each key, in float32."""
    keys = k.shape[1]
    weights = (q @ k.transpose(1, 2)).float().mul_(scale).view(-1, piece.count, keys)
    hidden = keys if window < keys else piece.count  # without a window only the last keys are hidden
    mask = shared.mask(piece.count, hidden, window, q.device)
    weights[..., -hidden:].masked_fill_(~mask, -math.inf)
    return weights.softmax(-1).view(len(q), -1, keys)


class _ByProducts(torch.autograd.Function):
    """`by_pieces` in plain products over pieces that fit a CPU's cache.

    In bfloat16 torch's own attention for CPUs reaches a sixth of what products reach; this takes half its time, and
    rounds the scores to bfloat16, as transformers' eager attention does. (In float32 torch's is as fast or faster.)
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, shared: SharedPrompts, window: int, scale: float
    ) -> Tensor:
        query, key, value = query[0], key[0], value[0]
        heads, time, width = *query.shape[:2], value.shape[2]
        out = query.new_empty(time, heads, width)
        for piece in _pieces(shared, heads, len(key), window):
            weights = _weights(piece.of_queries(query), piece.of_keys(key), piece, shared, window, scale)
            attended = weights.to(query.dtype) @ piece.of_keys(value)
            out[piece.queries, piece.heads] = attended.view(-1, piece.count, width).transpose(0, 1)
        ctx.save_for_backward(query, key, value, out)
        ctx.settings = shared, window, scale
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, out = ctx.saved_tensors
        shared, window, scale = ctx.settings
        # d softmax needs sum(p * dp) of each query, which is the product of what came out and its gradient
        inner = (gradient[0].float() * out.float()).sum(-1, keepdim=True).transpose(0, 1)  # [heads, time, 1]
        outer = gradient[0].transpose(0, 1)
        for_query = torch.empty_like(query)
        for_key, for_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
        for piece in _pieces(shared, len(query), len(key), window):
            q, k, g = piece.of_queries(query), piece.of_keys(key), piece.of_queries(outer)
            weights = _weights(q, k, piece, shared, window, scale)
            slopes = (g @ piece.of_keys(value).transpose(1, 2)).float()
            slopes = slopes.sub_(piece.of_queries(inner)).mul_(weights).to(q.dtype)
            for_query[piece.heads, piece.queries] = (slopes @ k).mul_(scale).view(-1, piece.count, q.shape[2])
            before = piece.prompt.stop - piece.prompt.start
            key_slopes = slopes.transpose(1, 2) @ q
            value_slopes = weights.to(q.dtype).transpose(1, 2) @ g
            for whole, part in ((for_key, key_slopes), (for_value, value_slopes)):
                whole[piece.kv_heads, piece.prompt] += part[:, :before]
                whole[piece.kv_heads, piece.own] += part[:, before:]
        found = (for_query, for_key.mul_(scale).to(key.dtype), for_value.to(value.dtype))
        return *(x[None] for x in found), None, None, None


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
