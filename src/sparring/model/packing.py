"""Packs groups of responses into tensors.

`pack_shared` packs groups into one row in which the responses of a group share their prompt. `pack_padded`, its
readable twin, gives every response its own row, prompt included; models that cannot share a prompt get this one. In
both, `positions`, `targets` and `num_tokens` identify the response tokens.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparring.model.attention import SharedPrompts
from sparring.types import Group, Lengths, Role, Scores, TokenIds

ResponseCounts = tuple[tuple[Role, int], ...]
"""The roles of a group in order, with the number of responses of each."""

Packing = Literal["shared", "padded"]


@dataclass(frozen=True)
class PackedBatch:
    """Responses in the order of the groups and their roles. Equal responses to one prompt are computed once."""

    input_ids: Int[Tensor, "rows time"]
    position_ids: Int[Tensor, "rows time"]
    attention_mask: Int[Tensor, "rows time"]
    shared_prompts: SharedPrompts | None
    positions: Int[Tensor, " tokens"]  # in the flattened rows: the hidden state that predicts each token
    targets: Int[Tensor, " tokens *candidates"]  # of the distinct responses, concatenated; see `targets_of`
    distinct_lengths: tuple[int, ...]  # tokens of each distinct response
    response_index: Int[Tensor, " responses"]  # which distinct response each response equals
    num_tokens: Int[Tensor, " responses"]
    counts: ResponseCounts

    @property
    def computed_tokens(self) -> int:
        """Tokens that the model computes, without padding."""
        return int(self.attention_mask.sum())

    def to(self, device: torch.device) -> PackedBatch:
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return PackedBatch(**{**vars(self), **tensors})

    def by_role(self, values: Tensor) -> Mapping[Role, Tensor]:
        """Splits per-response values, shape [responses], into the shapes of `Scores`."""
        per_group = values.reshape(-1, sum(count for _, count in self.counts))
        columns = per_group.split([count for _, count in self.counts], dim=1)
        return {
            role: column if role == "generated" else column[:, 0]
            for (role, _), column in zip(self.counts, columns, strict=True)
        }

    def sums(self, token_logprobs: Float[Tensor, " tokens *candidates"]) -> Float[Tensor, " responses"]:
        """log p of each response, from the log-probs of `targets`."""
        if token_logprobs.ndim == 2:
            token_logprobs = token_logprobs[:, 0]
        # segment by segment instead of a scatter: the same order of additions on every run and device
        sums = torch.stack([segment.sum() for segment in token_logprobs.split(self.distinct_lengths)])
        return sums.index_select(0, self.response_index)

    def scores(self, token_logprobs: Float[Tensor, " tokens *candidates"]) -> Scores:
        return self.by_role(self.sums(token_logprobs))

    def token_scores(
        self, values: Num[Tensor, " tokens *candidates"], roles: Sequence[Role]
    ) -> Mapping[Role, Num[Tensor, ...]]:
        """Values of single targets in the shapes of `Scores`, with a dimension for tokens, padded with 0."""
        if not roles:
            return {}
        padded = pad_sequence(list(values.split(self.distinct_lengths)), batch_first=True)
        of_responses = padded.index_select(0, self.response_index)
        by_role = self.by_role(torch.arange(len(of_responses), device=of_responses.device))
        return {role: of_responses[by_role[role]] for role in roles}

    def lengths(self) -> Lengths:
        return self.by_role(self.num_tokens)


def pack(packing: Packing, groups: Sequence[Group]) -> PackedBatch:
    return pack_shared(groups) if packing == "shared" else pack_padded(groups)


def pack_shared(groups: Sequence[Group]) -> PackedBatch:
    """One row: prompt, its distinct responses, the next prompt, ... Positions restart after each prompt.

    All groups must have the same roles with the same number of responses.
    """
    counts = common_response_counts(groups)
    sizes, tokens, position_ids, positions, targets, response_index = [], [], [], [], [], []
    start = num_distinct = 0
    for group in groups:
        responses, first_of = distinct_responses(group)
        prompt = len(group.prompt_ids)
        sizes.append((prompt, *(len(r) for r in responses)))
        tokens += [group.prompt_ids, *responses]
        position_ids.append(np.arange(prompt))
        at = start + prompt
        for response in responses:
            position_ids.append(np.arange(prompt, prompt + len(response)))
            # each token is predicted by the state before it: for a response's first token, the prompt's last
            positions += [np.array([start + prompt - 1]), np.arange(at, at + len(response) - 1)]
            at += len(response)
        targets += [targets_of(group)[first_of.index(i)] for i in range(len(responses))]
        response_index += [num_distinct + i for i in first_of]
        num_distinct += len(responses)
        start = at
    lengths = [n for _, *rest in sizes for n in rest]
    return PackedBatch(
        input_ids=_row(tokens),
        position_ids=_row(position_ids),
        attention_mask=torch.ones(1, start, dtype=torch.long),
        shared_prompts=SharedPrompts(tuple(sizes)),
        positions=_tensor(positions),
        targets=_tensor(targets),
        distinct_lengths=tuple(lengths),
        response_index=torch.tensor(response_index),
        num_tokens=torch.tensor([lengths[i] for i in response_index]),
        counts=counts,
    )


def pack_padded(groups: Sequence[Group]) -> PackedBatch:
    """One row per response: prompt + response, padded on the right.

    All groups must have the same roles with the same number of responses. Padding is identified by length, never by a
    token's value: an end token inside a response is attended to and scored like any other.
    """
    counts = common_response_counts(groups)
    prompts = [group.prompt_ids for group in groups for _ in responses_of(group)]
    responses = [response for group in groups for response in responses_of(group)]
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
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.arange(time).expand(len(prompts), time),
        attention_mask=torch.from_numpy((column < end).astype(np.int64)),
        shared_prompts=None,
        positions=torch.from_numpy(token_at - 1),  # each token is predicted by the state before it
        targets=_tensor([targets for group in groups for targets in targets_of(group)]),
        distinct_lengths=tuple(num_response.tolist()),
        response_index=torch.arange(len(responses)),
        num_tokens=torch.from_numpy(num_response),
        counts=counts,
    )


def _row(parts: Sequence[np.ndarray]) -> Int[Tensor, "1 time"]:
    return _tensor(parts)[None]


def _tensor(parts: Sequence[np.ndarray]) -> Int[Tensor, " total *columns"]:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def response_counts(group: Group) -> ResponseCounts:
    return tuple((role, len(responses)) for role, responses in group.responses.items())


def common_response_counts(groups: Sequence[Group]) -> ResponseCounts:
    counts = response_counts(groups[0])
    for group in groups:
        if response_counts(group) != counts:
            raise ValueError(f"group {group.id} has other roles or numbers of responses than {groups[0].id}")
    return counts


def responses_of(group: Group) -> list[TokenIds]:
    return [response for responses in group.responses.values() for response in responses]


def targets_of(group: Group) -> list[np.ndarray]:
    """Of each response, what is scored: its tokens, [tokens], or each with its candidates, [tokens, 1 + candidates]."""
    if not group.candidates:
        return responses_of(group)
    return [
        np.column_stack([response, candidates])
        for role, responses in group.responses.items()
        for response, candidates in zip(responses, group.candidates[role], strict=True)
    ]


def distinct_responses(group: Group) -> tuple[list[TokenIds], list[int]]:
    """The distinct responses, and which of them each response equals.

    Computing equal responses once is exact for every objective: their log-probs are equal, and gradients add up.
    """
    place: dict[tuple[int, ...], int] = {}
    response_index = [place.setdefault(tuple(response.tolist()), len(place)) for response in responses_of(group)]
    return [responses_of(group)[response_index.index(i)] for i in range(len(place))], response_index


def group_tokens(packing: Packing, group: Group) -> int:
    """Tokens of a micro-batch of this group alone, padding included."""
    if packing == "padded":
        return len(responses_of(group)) * row_tokens(group)
    return len(group.prompt_ids) + sum(len(response) for response in distinct_responses(group)[0])


def row_tokens(group: Group) -> int:
    """Length of the group's longest padded row."""
    return len(group.prompt_ids) + max(len(r) for r in responses_of(group))


def micro_batches(packing: Packing, groups: Sequence[Group], micro_batch_tokens: int) -> list[list[int]]:
    """Indices into `groups`, in micro-batches of at most `micro_batch_tokens` tokens, the largest first.

    Largest first: running out of memory happens at once, not after hours. A larger group gets its own micro-batch.
    Groups with other roles or numbers of responses are not mixed.
    """
    alike: dict[ResponseCounts, list[int]] = {}
    for index, group in enumerate(groups):
        alike.setdefault(response_counts(group), []).append(index)
    batches: list[list[int]] = []
    for indices in alike.values():
        same = [groups[i] for i in indices]
        if packing == "padded":
            cut = list(_padded_batches(same, micro_batch_tokens))
        else:
            cut = _packed_batches([group_tokens("shared", group) for group in same], micro_batch_tokens)
        batches += [[indices[i] for i in batch] for batch in cut]
    if len(alike) > 1:
        batches.sort(key=lambda batch: -sum(group_tokens(packing, groups[i]) for i in batch))
    return batches


def assign_to_ranks(packing: Packing, groups: Sequence[Group], ranks: int) -> list[list[int]]:
    """Indices into `groups` for each rank, with about as many tokens each.

    Assigns the largest groups first, each to the rank that has the fewest tokens so far.
    """
    if ranks == 1:
        return [list(range(len(groups)))]
    sizes = [group_tokens(packing, group) for group in groups]
    by_rank: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    for index in sorted(range(len(groups)), key=lambda i: (-sizes[i], i)):
        load, rank = loads[0]
        by_rank[rank].append(index)
        heapreplace(loads, (load + sizes[index], rank))
    return by_rank


def rank_batches(
    packing: Packing, groups: Sequence[Group], micro_batch_tokens: int, ranks: int
) -> list[list[list[int]]]:
    """The micro-batches of each rank, all with the same number of them.

    Ranks with sharded weights must run the same number of passes. A rank with fewer micro-batches splits some of its
    own in two; if it has none to split, it gets empty ones.
    """
    if ranks == 1:
        return [micro_batches(packing, groups, micro_batch_tokens)]
    by_rank = assign_to_ranks(packing, groups, ranks)
    cut = [
        [[mine[i] for i in b] for b in micro_batches(packing, [groups[i] for i in mine], micro_batch_tokens)]
        for mine in by_rank
    ]
    most = max(map(len, cut))
    for batches in cut:
        while len(batches) < most:
            longest = max(range(len(batches)), key=lambda b: len(batches[b]), default=None)
            if longest is None or len(batches[longest]) < 2:
                batches.append([])
            else:
                batch = batches[longest]
                batches[longest : longest + 1] = [batch[::2], batch[1::2]]
    return cut


def _packed_batches(sizes: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Best-fit decreasing bin packing."""
    batches: list[list[int]] = []
    filled: list[int] = []
    room: list[tuple[int, int]] = []  # (tokens left, batch), ascending
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = bisect_left(room, (sizes[index], -1))
        if place == len(room):
            left, batch = micro_batch_tokens, len(batches)
            batches.append([])
            filled.append(0)
        else:
            left, batch = room.pop(place)
        batches[batch].append(index)
        filled[batch] += sizes[index]
        insort(room, (left - sizes[index], batch))
    return [batches[b] for b in sorted(range(len(batches)), key=lambda b: (-filled[b], b))]


def _padded_batches(groups: Sequence[Group], micro_batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    rows = width = 0
    for index in sorted(range(len(groups)), key=lambda i: (-row_tokens(groups[i]), i)):
        group_rows = len(responses_of(groups[index]))
        width = width if batch else row_tokens(groups[index])
        if batch and (rows + group_rows) * width > micro_batch_tokens:
            yield batch
            batch, rows, width = [], 0, row_tokens(groups[index])
        batch.append(index)
        rows += group_rows
    if batch:
        yield batch
