"""Attention over shared prompts: the responses of a group see their prompt and themselves, nothing else.

A packed row holds prompt, response, response, ..., prompt, response, ... Each prompt attends to itself once,
and each response to its prompt and itself, as calls of torch's attention of their own: no work is spent on
what a mask would hide. (FlexAttention, which skips hidden blocks too, has no backward pass on CPU.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "sparring"
"""The attention implementation a model is set to. Where no `shared_prompts` are passed it is torch's, as ever."""

QUERIES = 256
"""Positions of a response that are attended at a time, so that what a mask hides is a small share of what is computed:
measured on CPU, a fifth off the attention of 800 tokens and a third off that of 1,600, and nothing lost below."""


@dataclass(frozen=True)
class SharedPrompts:
    """Where the groups of a packed row lie: in order, the tokens of each prompt and of its responses."""

    sizes: tuple[tuple[int, ...], ...]
    masks: dict[tuple[int, int, int], Bool[Tensor, "queries keys"]] = field(default_factory=dict)  # made once per row

    def mask(self, queries: int, keys: int, window: int, device: torch.device) -> Bool[Tensor, "queries keys"]:
        """Which keys each of the last `queries` positions sees: at most `window`, the last its own."""
        window = min(window, keys)
        if (queries, keys, window) not in self.masks:
            before = keys - queries
            visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
            self.masks[queries, keys, window] = visible.triu(before - window + 1)
        return self.masks[queries, keys, window]


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

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        settings = {"scale": scaling, "enable_gqa": q.shape[1] != k.shape[1]}
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
    pieces = [size for sizes in shared_prompts.sizes for size in sizes]
    parts = zip(*(x.split(pieces, dim=2) for x in (query, key, value)), strict=True)
    attended = []
    for sizes in shared_prompts.sizes:
        q, prompt_k, prompt_v = next(parts)
        attended.append(attend(q, prompt_k, prompt_v))
        for _ in sizes[1:]:
            q, k, v = next(parts)
            attended.append(attend(q, torch.cat([prompt_k, k], dim=2), torch.cat([prompt_v, v], dim=2)))
    return torch.cat(attended, dim=1), None


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
