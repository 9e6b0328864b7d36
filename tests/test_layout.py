"""Micro-batches and rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparring.layout import micro_batches, num_rows, padded_rows, row_tokens
from sparring.types import Group


def group(name: str, prompt: int, real: int, generated: list[int]) -> Group:
    def ids(count: int) -> np.ndarray:
        return np.ones(count, dtype=np.int32)

    return Group(name, ids(prompt), {"real": (ids(real),), "generated": tuple(ids(n) for n in generated)})


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=40)


@given(sizes=sizes, budget=st.integers(1, 500))
def test_micro_batches_are_a_partition_within_budget(sizes: list[tuple[int, int, int]], budget: int) -> None:
    groups = [group(str(i), p, r, [g]) for i, (p, r, g) in enumerate(sizes)]
    batches = list(micro_batches(groups, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    for batch in batches:
        rows = sum(num_rows(groups[i]) for i in batch)
        width = max(row_tokens(groups[i]) for i in batch)
        assert rows * width <= budget or len(batch) == 1
    widths = [row_tokens(groups[i]) for batch in batches for i in batch]
    assert widths == sorted(widths, reverse=True), "the longest come first"


@given(sizes=sizes)
def test_rows_hold_every_token_once(sizes: list[tuple[int, int, int]]) -> None:
    groups = [group(str(i), p, r, [g, r]) for i, (p, r, g) in enumerate(sizes)]
    layout = padded_rows(groups)
    assert int(layout.attention_mask.sum()) == sum(3 * p + 2 * r + g for p, r, g in sizes)
    assert layout.num_tokens.tolist() == [n for _, r, g in sizes for n in (r, g, r)]
    assert len(layout.targets) == int(layout.num_tokens.sum())


def test_values_go_back_to_their_roles() -> None:
    groups = [group("a", 2, 3, [1, 4]), group("b", 1, 1, [2, 2])]
    scores = padded_rows(groups).scores(torch.arange(6.0))
    assert scores["real"].tolist() == [0, 3]
    assert scores["generated"].tolist() == [[1, 2], [4, 5]]


def test_groups_of_other_shapes_are_an_error() -> None:
    with pytest.raises(ValueError, match="other responses"):
        padded_rows([group("a", 2, 3, [1]), group("b", 1, 1, [2, 2])])
