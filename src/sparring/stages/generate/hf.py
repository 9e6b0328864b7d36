"""Samples with transformers' `generate`, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from sparring.stages.generate.answers import finish_generation
from sparring.types import Generation, Prompt

BATCH_SIZE = 64


class HfBackend:
    """Batches of similar length, with separate random numbers for each response.

    A response depends only on its prompt and seed, up to rounding, which can depend on the shape of the batch. Batches
    are a function of the prompts, so a rerun repeats them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        end_ids: Sequence[int],
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.model = model
        self.end_ids = list(end_ids)
        self.temperature = temperature
        self.top_p = top_p
        self.batch_size = batch_size
        # generate() takes unset values from the model's own configuration; with its temperature or repetition penalty
        # the samples would not be samples of the model
        model.generation_config = GenerationConfig()

    def generate(self, prompts: Sequence[Prompt], *, greedy: bool = False) -> Iterator[Generation]:
        """In the order of `prompts`. Batches are padded to their longest prompt, so sort prompts by length."""
        for start in range(0, len(prompts), self.batch_size):
            yield from self._batch(prompts[start : start + self.batch_size], greedy or self.temperature == 0)

    @torch.no_grad()
    def _batch(self, prompts: Sequence[Prompt], greedy: bool) -> Iterator[Generation]:
        width = max(len(p.token_ids) for p in prompts)
        input_ids = np.zeros((len(prompts), width), dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for row, mask, prompt in zip(input_ids, attention_mask, prompts, strict=True):
            row[width - len(prompt.token_ids) :] = prompt.token_ids
            mask[width - len(prompt.token_ids) :] = 1
        max_new_tokens = max(p.max_new_tokens for p in prompts)
        sampler = [] if greedy else [self._sampler(prompts, max_new_tokens, width)]
        output = cast(Any, self.model).generate(
            input_ids=torch.from_numpy(input_ids).to(self.model.device),
            attention_mask=torch.from_numpy(attention_mask).to(self.model.device),
            logits_processor=LogitsProcessorList(sampler),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.end_ids,
                pad_token_id=self.end_ids[0],  # only after an end token, where it is truncated below
            ),
        )
        for prompt, tokens in zip(prompts, output[:, width:].cpu().numpy(), strict=True):
            yield finish_generation(prompt, tokens, self.end_ids)

    def _sampler(self, prompts: Sequence[Prompt], max_new_tokens: int, width: int) -> LogitsProcessor:
        draws = np.stack([uniforms(max_new_tokens, p.seed) for p in prompts])
        warpers = LogitsProcessorList()
        if self.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_p < 1.0:
            warpers.append(TopPLogitsWarper(self.top_p))
        return InverseTransform(torch.from_numpy(draws).to(self.model.device), width, warpers)


class InverseTransform(LogitsProcessor):
    """Keeps one token per row: the first whose cumulative probability exceeds the row's random number of this step.

    This samples from softmax(logits), with randomness that belongs to the row and not to the batch.
    """

    def __init__(self, draws: Float[Tensor, "batch steps"], width: int, warpers: LogitsProcessorList) -> None:
        self.draws = draws
        self.width = width
        self.warpers = warpers

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.width
        chosen = choose(self.warpers(input_ids, scores), self.draws[:, step])
        only = torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)
        return cast(torch.FloatTensor, only)


def uniforms(count: int, seed: int) -> Float[np.ndarray, " count"]:
    """Uniform numbers in [0, 1), float64."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)


def choose(scores: Float[Tensor, "batch vocab"], draws: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The token at `draws`, in [0, 1), of each row's cumulative distribution."""
    # float64: in float32 the sum over a large vocabulary loses the rare tokens
    cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
    # scaled by the last sum, which is 1 up to rounding; right: a token of probability 0 is never chosen
    return torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(1)
