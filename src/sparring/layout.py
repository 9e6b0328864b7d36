"""How a list of groups becomes tensors.

This version gives every response a padded row of its own, prompt included. It is the readable form;
what a layout promises is only that `positions`, `targets` and `response` name the response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sparring.types import Group, Lengths, Role, Scores

Shape = tuple[tuple[Role, int], ...]
"""The roles of a group in order, with the number of responses of each."""


@dataclass(frozen=True)
class Layout:
    input_ids: Int[Tensor, "rows time"]
    attention_mask: Int[Tensor, "rows time"]
    positions: Int[Tensor, " tokens"]  # in the flattened rows: the hidden state that predicts the token
    targets: Int[Tensor, " tokens"]  # the response tokens, response after response
    num_tokens: Int[Tensor, " responses"]
    shape: Shape

    def to(self, device: torch.device) -> Layout:
        return Layout(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.num_tokens.to(device),
            self.shape,
        )

    def by_role(self, values: Tensor) -> Mapping[Role, Tensor]:
        """Splits per-response values, shape [responses], into the shapes that `Scores` has."""
        per_group = values.reshape(-1, sum(count for _, count in self.shape))
        columns = per_group.split([count for _, count in self.shape], dim=1)
        return {
            role: column if role == "generated" else column[:, 0]
            for (role, _), column in zip(self.shape, columns, strict=True)
        }

    def scores(self, logprobs: Tensor) -> Scores:
        return self.by_role(logprobs)

    def lengths(self) -> Lengths:
        return self.by_role(self.num_tokens)


def padded_rows(groups: Sequence[Group]) -> Layout:
    """One row per response: prompt + response, padded on the right.

    All groups must have the same roles with the same number of responses. Padding is told by length,
    never by a token's value: an end token inside a response is attended to and scored like any other.
    """
    shape = shape_of(groups[0])
    prompts, responses = [], []
    for group in groups:
        if shape_of(group) != shape:
            raise ValueError(f"group {group.id} has other responses than {groups[0].id}")
        for role, count in shape:
            prompts += [group.prompt_ids] * count
            responses += group.responses[role]
    num_prompt = np.array([len(p) for p in prompts])
    num_response = np.array([len(r) for r in responses])
    time = int((num_prompt + num_response).max())
    input_ids = np.zeros((len(prompts), time), dtype=np.int64)
    for row, prompt, response in zip(input_ids, prompts, responses, strict=True):
        row[: len(prompt)] = prompt
        row[len(prompt) : len(prompt) + len(response)] = response
    column = np.arange(time)
    end = (num_prompt + num_response)[:, None]
    is_response = (column >= num_prompt[:, None]) & (column < end)
    token_at = np.flatnonzero(is_response)
    return Layout(
        input_ids=torch.from_numpy(input_ids),
        attention_mask=torch.from_numpy((column < end).astype(np.int64)),
        positions=torch.from_numpy(token_at - 1),  # the state before a token predicts it
        targets=torch.from_numpy(input_ids.reshape(-1)[token_at]),
        num_tokens=torch.from_numpy(num_response),
        shape=shape,
    )


def shape_of(group: Group) -> Shape:
    return tuple((role, len(responses)) for role, responses in group.responses.items())


def row_tokens(group: Group) -> int:
    """Length of the group's longest row."""
    return len(group.prompt_ids) + max(len(r) for rs in group.responses.values() for r in rs)


def num_rows(group: Group) -> int:
    return sum(len(responses) for responses in group.responses.values())


def micro_batches(groups: Sequence[Group], token_budget: int) -> Iterator[list[int]]:
    """Indices into `groups`, longest first, cut so that padded rows hold at most `token_budget` tokens.

    Longest first: the most memory is needed at once, not after hours. A group that is larger than the
    budget stands alone.
    """
    batch: list[int] = []
    rows = width = 0
    for index in sorted(range(len(groups)), key=lambda i: (-row_tokens(groups[i]), i)):
        width = width if batch else row_tokens(groups[index])
        if batch and (rows + num_rows(groups[index])) * width > token_budget:
            yield batch
            batch, rows, width = [], 0, row_tokens(groups[index])
        batch.append(index)
        rows += num_rows(groups[index])
    if batch:
        yield batch
