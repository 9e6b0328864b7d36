"""log p(response | prompt). The score, train and evaluate stages all use this scorer, in one dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from sparring.errors import UserError
from sparring.model import attention
from sparring.model.attention import CannotSharePrompts, narrow_windows, why_not_shared
from sparring.model.kernels import linear_logprob, linear_topk
from sparring.model.memory import run_within_memory
from sparring.model.packing import (
    PackedBatch,
    Packing,
    group_tokens,
    pack,
    pack_padded,
    pack_shared,
    rank_batches,
    response_counts,
)
from sparring.parallel import Parallel
from sparring.types import Group, Role, TokenIds

PROBE_WINDOW = 2
"""Tokens of a sliding window in the second comparison, fewer than the probe has."""
PROBE_TOLERANCE = 1e-3
"""Nats over a few tokens in float32: far above rounding, far below any real error."""


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


class InFloat32(TorchFunctionMode):
    """Computes in float32 whatever would be bfloat16 or float16, one weight at a time.

    For comparisons: bfloat16 alone moves log-probs of a real model by 0.3 nats, as far as some errors do.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "__get__":  # an attribute: no copy of a weight for each
            return _widen(function(*args))
        return function(*tree_map(_widen, args), **tree_map(_widen, kwargs or {}))


def _widen(value: Any) -> Any:
    narrow = (torch.bfloat16, torch.float16)
    if isinstance(value, Tensor):
        return value.float() if value.dtype in narrow else value
    return torch.float32 if isinstance(value, torch.dtype) and value in narrow else value


class Scorer(nn.Module):
    """A causal language model as a function from a packed batch to log-probs of its targets, in nats, float32.

    Parameters stay float32; `dtype` bfloat16 computes under autocast. Only response positions go through the output
    head: their hidden states are selected before the matrix product. A module, so that DDP and FSDP2 can wrap it.

    `packing` is "shared" if the model computes the same log-probs from shared rows as from padded ones; otherwise
    "padded", with the reason in `why_padded`.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype = torch.float32, packing: Packing = "shared") -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype
        self.scale, self.softcap = head_settings(model)
        self.packing: Packing = "padded"
        self.why_padded: str | None = None
        self.check_head()
        if packing == "shared":
            self.why_padded = why_not_shared(model) or self.share_prompts()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"{type(self.model).__name__} has no linear output head. A causal language model is needed."
            )
        return head

    def precision(self) -> AbstractContextManager[object]:
        if self.dtype == torch.float32:
            return nullcontext()
        # its cache would keep a copy of every weight until the end of the pass
        return torch.autocast(self.device.type, dtype=self.dtype, cache_enabled=False)

    def forward(self, batch: PackedBatch) -> Float[Tensor, " tokens *candidates"]:
        """log p of each of the batch's targets; `batch.scores` adds them up."""
        with self.precision():
            return self.token_logprobs(batch)

    def logprobs(self, batch: PackedBatch) -> Float[Tensor, " responses"]:
        """As `forward`, in the caller's precision and added up."""
        return batch.sums(self.token_logprobs(batch))

    def token_logprobs(self, batch: PackedBatch) -> Float[Tensor, " tokens *candidates"]:
        return self.target_logprobs(self.states(batch), batch.targets)

    @torch.no_grad()
    def likeliest(
        self, batch: PackedBatch, count: int
    ) -> tuple[Int[Tensor, "tokens count"], Float[Tensor, "tokens count+1"]]:
        """The `count` most probable tokens in place of each target, and log p of the target and of each of them."""
        with self.precision():
            states, head = self.states(batch), self.head
            candidates = linear_topk(states, head.weight, head.bias, count)
            return candidates, self.target_logprobs(states, torch.cat([batch.targets[:, None], candidates], dim=1))

    def states(self, batch: PackedBatch) -> Float[Tensor, "tokens width"]:
        """The hidden states that predict the targets."""
        hidden = self.model.base_model(**model_inputs(batch), use_cache=False).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.positions)

    def target_logprobs(
        self, states: Float[Tensor, "tokens width"], targets: Int[Tensor, " tokens *candidates"]
    ) -> Float[Tensor, " tokens *candidates"]:
        head = self.head
        return linear_logprob(
            states,
            head.weight,
            head.bias,
            targets,
            scale=self.scale,
            softcap=self.softcap,
            is_kept=not self.model.is_gradient_checkpointing,  # checkpointing trades time for memory
        )

    @torch.no_grad()
    def check_head(self) -> None:
        """Compares with the model's own logits of single rows once, and refuses a model that it does not reproduce."""
        ids = self.probe()
        groups = [Group(str(end), ids[:1], {"real": (ids[1:end],)}) for end in (len(ids), len(ids) // 2)]
        with InFloat32():
            expected, beside = self.own_logprobs(groups)
            ours, padded = self.logprobs(pack_padded(groups).to(self.device))
        name = type(self.model).__name__
        if not abs(ours - expected) <= PROBE_TOLERANCE:
            raise UserError(
                f"{name} transforms its logits in an unsupported way: log p of a test sequence is "
                f"{expected.item():.4f}, but {ours.item():.4f} when computed from the output head. Please report the "
                f"model type '{self.model.config.model_type}'."
            )
        if not abs(padded - beside) <= PROBE_TOLERANCE:
            raise UserError(
                f"{name} does not ignore padding: log p of a test sequence is {beside.item():.4f} alone, but "
                f"{padded.item():.4f} beside a longer one. Use another model."
            )

    def own_logprobs(self, groups: Sequence[Group]) -> list[Tensor]:
        """From the model's own logits, one row at a time."""
        found = []
        for group in groups:
            row = pack_padded([group]).to(self.device)
            is_response = torch.arange(row.input_ids.shape[1], device=self.device)[None] >= len(group.prompt_ids)
            logits = self.model(**model_inputs(row), use_cache=False).logits
            found.append(sequence_logprobs(logits, row.input_ids, is_response)[0])
        return found

    @torch.no_grad()
    def share_prompts(self) -> str | None:
        """Turns prompt sharing on and compares with padded rows; returns the reason if it must stay off.

        A window longer than the probe would go unseen, so models with sliding windows are compared with short ones too.
        """
        ids = self.probe()
        groups = [
            Group(str(i), ids[i : i + 3], {"real": (ids[i + 3 :],), "generated": (ids[1:3], ids[:i])}) for i in (2, 3)
        ]
        padded, shared = pack_padded(groups).to(self.device), pack_shared(groups).to(self.device)
        assert shared.shared_prompts is not None
        shared = replace(shared, shared_prompts=replace(shared.shared_prompts, in_pieces=True))

        def logprobs(batch: PackedBatch, window: int | None) -> Tensor:
            with InFloat32(), nullcontext() if window is None else narrow_windows(self.model, window):
                return self.logprobs(batch)

        expected = {window: logprobs(padded, window) for window in (None, PROBE_WINDOW)}
        before = self.model.config._attn_implementation or "sdpa"  # transformers has no public accessor
        self.model.set_attn_implementation(attention.NAME)

        def difference(window: int | None) -> float:
            return float((logprobs(shared, window) - expected[window]).abs().max())

        try:
            if (found := difference(None)) > PROBE_TOLERANCE:
                problem = f"log-probs of shared rows differ from those of padded rows by {found:.2g}"
            elif difference(PROBE_WINDOW) > PROBE_TOLERANCE:
                problem = "its sliding window is in its mask and does not reach its attention"
            else:
                self.packing = "shared"
                return None
        except CannotSharePrompts as error:
            problem = str(error)
        except TypeError as error:
            problem = f"its forward does not accept the arguments that shared prompts need ({error})"
        self.model.set_attn_implementation(before)
        return problem

    def probe(self) -> TokenIds:
        """A few token ids of the vocabulary."""
        return (np.arange(1, 9) * 7919 % self.head.weight.shape[0]).astype(np.int32)


def model_inputs(batch: PackedBatch) -> dict[str, object]:
    inputs: dict[str, object] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
    if batch.shared_prompts is None:
        return {**inputs, "attention_mask": batch.attention_mask}
    # transformers passes a 4-dimensional mask through; without one it would infer packed sequences from the positions
    # and build a mask of the whole row
    nothing = batch.input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool)
    return {**inputs, "attention_mask": nothing, "shared_prompts": batch.shared_prompts}


def head_settings(model: PreTrainedModel) -> tuple[float, float | None]:
    """How the model transforms its logits after the head: (factor, soft cap)."""
    config = model.config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
    if getattr(config, "logit_scale", None) is not None:  # Cohere
        return config.logit_scale, softcap
    if getattr(config, "logits_scaling", None) is not None:  # Granite
        return 1 / config.logits_scaling, softcap
    return 1.0, softcap


def score_groups(
    scorer: Scorer,
    groups: Sequence[Group],
    micro_batch_tokens: int,
    parallel: Parallel,
    advance: Callable[[int, int], object] = lambda groups, tokens: None,
    steps: Sequence[Sequence[int]] | None = None,
) -> dict[Role, Float[np.ndarray, ...]]:
    """Log-probs of all responses, in the order of `groups`: [groups], and [groups, most samples] for generated.

    Ranks divide the groups among themselves, and each returns all log-probs. When memory runs out, the remaining
    groups are packed into smaller micro-batches. `advance` gets the groups and tokens of each micro-batch.

    With `steps`, the indices of the groups of each optimizer step, micro-batches and kernels are those of training.
    Gradients are on for that, although none is computed: torch chooses kernels by it.
    """
    result: dict[Role, np.ndarray] = {}
    for role, count in max((response_counts(group) for group in groups), key=lambda counts: sum(n for _, n in counts)):
        result[role] = np.zeros((len(groups), count) if role == "generated" else len(groups), dtype=np.float32)

    def score(batch: PackedBatch, indices: Sequence[int]) -> None:
        for role, values in batch.scores(scorer(batch).detach()).items():
            within = (indices, slice(values.shape[1])) if role == "generated" else indices
            result[role][within] = values.cpu().numpy()

    with torch.set_grad_enabled(steps is not None):
        _for_each_batch(scorer, groups, micro_batch_tokens, parallel, advance, steps, score)
    return {role: parallel.all_reduce_sum(torch.from_numpy(values)).numpy() for role, values in result.items()}


def score_candidates(
    scorer: Scorer,
    groups: Sequence[Group],
    count: int,
    micro_batch_tokens: int,
    parallel: Parallel,
    advance: Callable[[int, int], object] = lambda groups, tokens: None,
) -> tuple[Int[np.ndarray, "groups samples tokens count"], Float[np.ndarray, "groups samples tokens count+1"]]:
    """The `count` likeliest tokens in place of each token of the generated responses, and log p of the token and of
    those. Padded with 0. Ranks and memory as in `score_groups`."""
    samples = max(len(group.responses["generated"]) for group in groups)
    longest = max(len(response) for group in groups for response in group.responses["generated"])
    candidates = np.zeros((len(groups), samples, longest, count), dtype=np.int32)
    logprobs = np.zeros((len(groups), samples, longest, 1 + count), dtype=np.float32)

    def score(batch: PackedBatch, indices: Sequence[int]) -> None:
        for result, values in zip((candidates, logprobs), scorer.likeliest(batch, count), strict=True):
            padded = batch.token_scores(values, ["generated"])["generated"].cpu().numpy()
            result[indices, : padded.shape[1], : padded.shape[2]] = padded

    _for_each_batch(scorer, groups, micro_batch_tokens, parallel, advance, None, score)
    found = (parallel.all_reduce_sum(torch.from_numpy(values)).numpy() for values in (candidates, logprobs))
    return next(found), next(found)


def _for_each_batch(
    scorer: Scorer,
    groups: Sequence[Group],
    micro_batch_tokens: int,
    parallel: Parallel,
    advance: Callable[[int, int], object],
    steps: Sequence[Sequence[int]] | None,
    compute: Callable[[PackedBatch, Sequence[int]], object],
) -> None:
    """Calls `compute` with each micro-batch of this rank and the indices of its groups, smaller ones when memory runs
    out; see `score_groups`."""
    done: set[int] = set()

    def compute_remaining(micro_batch_tokens: int) -> None:
        for step in [range(len(groups))] if steps is None else steps:
            batches = rank_batches(scorer.packing, [groups[i] for i in step], micro_batch_tokens, parallel.num_ranks)
            for places in batches[parallel.rank]:
                if indices := [step[i] for i in places if step[i] not in done]:
                    batch = pack(scorer.packing, [groups[i] for i in indices]).to(scorer.device)
                    compute(batch, indices)
                    done.update(indices)
                    advance(len(indices), batch.computed_tokens)

    largest = max((group_tokens(scorer.packing, group) for group in groups), default=0)
    run_within_memory(compute_remaining, micro_batch_tokens, largest)
    parallel.barrier()
