"""What all engines do with their output: truncate it at its end token, and restore the order of the prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from sparring.logging import info
from sparring.types import Generation, Prompt

NUM_CHECKED = 64
"""Prompts per call whose log-probs engines report: enough to detect another model. All would cost a tenth more."""


def finish_generation(
    prompt: Prompt, tokens: Int[np.ndarray, " steps"], end_ids: Sequence[int], logprob: float | None = None
) -> Generation:
    """Truncates output after its first end token, or at the prompt's own limit."""
    ends = np.flatnonzero(np.isin(tokens, end_ids))
    length = int(ends[0]) + 1 if len(ends) else len(tokens)
    if length > prompt.max_new_tokens or not len(ends):
        cut = tokens[: min(length, prompt.max_new_tokens)]
        return Generation(prompt.id, prompt.sample, cut.astype(np.int32), "length", logprob)
    return Generation(prompt.id, prompt.sample, tokens[:length].astype(np.int32), "stop", logprob)


def failed(prompt: Prompt, reason: str) -> Generation:
    info(f"note: no response to row {prompt.id}, sample {prompt.sample}: {reason}")
    return Generation(prompt.id, prompt.sample, np.array([], dtype=np.int32), "failed")


def in_order(answers: Iterable[tuple[int, Generation]]) -> Iterator[Generation]:
    """Sorts numbered responses: yields each one as soon as all before it have arrived."""
    waiting: dict[int, Generation] = {}
    place = 0
    for index, answer in answers:
        waiting[index] = answer
        while place in waiting:
            yield waiting.pop(place)
            place += 1
