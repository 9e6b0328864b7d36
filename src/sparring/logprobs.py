"""log p(response | prompt): the only scorer. The score, train and evaluate stages all use it, in one dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sparring.errors import Refused
from sparring.kernels import linear_logprob
from sparring.layout import Layout, micro_batches, padded_rows, shape_of
from sparring.types import Group, Role

# Elements of one block of float32 logits (128 MiB). More response tokens go through the head in blocks.
MAX_LOGITS = 2**25


def sequence_logprobs(
    logits: Float[Tensor, "batch time vocab"],
    input_ids: Int[Tensor, "batch time"],
    is_response: Bool[Tensor, "batch time"],
) -> Float[Tensor, " batch"]:
    """log p(response | prompt) from full logits: the readable twin of `Scorer`, for tests and other trainers.

    The logits at position i predict the token at i + 1. Nats, float32, summed over response tokens.
    """
    logp = logits[:, :-1].float().log_softmax(dim=-1)  # float: bf16 log-softmax loses the differences we train on
    token_logp = logp.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return torch.where(is_response[:, 1:], token_logp, 0.0).sum(dim=-1)


class Scorer(nn.Module):
    """A causal language model as a function from a layout to log-probs, shape [responses], nats, float32.

    Parameters stay float32; `dtype` bfloat16 computes under autocast. Only response positions go through
    the vocabulary head: the rows of the hidden states are selected before the product. A module, so that
    a distributed wrapper sees its forward.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.scale, self.softcap = head_settings(model)
        self.check_head()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise Refused(f"{type(self.model).__name__} has no linear output head; a causal language model is needed")
        return head

    def precision(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def forward(self, layout: Layout) -> Float[Tensor, " responses"]:
        with self.precision():
            return self.logprobs(layout)

    def logprobs(self, layout: Layout) -> Float[Tensor, " responses"]:
        hidden = self.model.base_model(
            input_ids=layout.input_ids, attention_mask=layout.attention_mask, use_cache=False
        ).last_hidden_state
        states = hidden.flatten(0, 1)[layout.positions]
        token_logprobs = self.token_logprobs(states, layout.targets)
        # segment by segment, not a scatter: the same order of additions on every run and device
        segments = token_logprobs.split(layout.num_tokens.tolist())
        return torch.stack([segment.sum() for segment in segments])

    def token_logprobs(
        self, states: Float[Tensor, "tokens width"], targets: Int[Tensor, " tokens"]
    ) -> Float[Tensor, " tokens"]:
        head = self.head
        block = max(1, MAX_LOGITS // head.weight.shape[0])

        def logprob(states: Tensor, targets: Tensor) -> Tensor:
            return linear_logprob(states, head.weight, head.bias, targets, scale=self.scale, softcap=self.softcap)

        if len(targets) <= block:
            return logprob(states, targets)
        blocks = zip(states.split(block), targets.split(block), strict=True)
        if not torch.is_grad_enabled():
            return torch.cat([logprob(s, t) for s, t in blocks])
        # recomputed in the backward pass, so that one block of logits exists at a time
        return torch.cat([checkpoint(logprob, s, t, use_reentrant=False, preserve_rng_state=False) for s, t in blocks])

    @torch.no_grad()
    def check_head(self) -> None:
        """Compares with the model's own logits once, in float32: an unknown head is refused, never wrong."""
        vocab = self.head.weight.shape[0]
        ids = (torch.arange(1, 9, device=self.device) * 7919 % vocab)[None]
        mask = torch.ones_like(ids)
        layout = Layout(
            input_ids=ids,
            attention_mask=mask,
            positions=torch.arange(7, device=self.device),
            targets=ids[0, 1:],
            num_tokens=torch.tensor([7]),
            shape=(("real", 1),),
        )
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = sequence_logprobs(logits, ids, torch.arange(8, device=self.device)[None] > 0)
        ours = self.logprobs(layout)
        if not torch.allclose(ours, expected, rtol=0, atol=1e-3):
            raise Refused(
                f"{type(self.model).__name__} does something between its hidden states and its logits that sparring "
                f"does not know: log p of a test sequence is {expected.item():.4f}, computed from the head alone "
                f"{ours.item():.4f}. Please report the model type '{self.model.config.model_type}'."
            )


def head_settings(model: PreTrainedModel) -> tuple[float, float | None]:
    """What the model does to its logits after the head: (factor, soft cap)."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        return config.logit_scale, softcap
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        return 1 / config.logits_scaling, softcap
    return 1.0, softcap


@torch.no_grad()
def score_groups(
    scorer: Scorer,
    groups: Sequence[Group],
    token_budget: int,
    advance: Callable[[int, int], object] = lambda groups, tokens: None,
) -> dict[Role, Float[np.ndarray, ...]]:
    """log-probs of all responses, in the order of `groups`: [groups], and [groups, samples] for generated.

    `advance` is told how many groups and tokens each micro-batch had.
    """
    result: dict[Role, np.ndarray] = {}
    for role, count in shape_of(groups[0]):
        result[role] = np.empty((len(groups), count) if role == "generated" else len(groups), dtype=np.float32)
    for indices in micro_batches(groups, token_budget):
        layout = padded_rows([groups[i] for i in indices]).to(scorer.device)
        for role, values in layout.scores(scorer(layout)).items():
            result[role][indices] = values.cpu().numpy()
        advance(len(indices), int(layout.attention_mask.sum()))
    return result
