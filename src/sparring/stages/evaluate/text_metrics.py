"""The form of responses: length, end tokens, diversity, repetition. On token ids, without end tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sparring.types import Generation, Rendered, TokenIds


def text_metrics(answers: Sequence[Generation], real: Sequence[TokenIds]) -> dict[str, float]:
    """Metrics of the policy's fresh responses, relative to the real responses of the same prompts."""
    bodies = [a.token_ids[:-1] if a.finish == "stop" else a.token_ids for a in answers]
    lengths = np.array([len(a.token_ids) for a in answers])
    copies = [np.array_equal(a.token_ids, r) for a, r in zip(answers, real, strict=True)]
    return {
        "length": float(lengths.mean()),
        "length_median": float(np.median(lengths)),
        "length_p95": float(np.percentile(lengths, 95)),
        "length_ratio": float(lengths.mean() / np.mean([len(r) for r in real])),
        "end_rate": float(np.mean([a.finish == "stop" for a in answers])),
        "copy_rate": float(np.mean(copies)),
        "distinct_1": distinct(bodies, 1),
        "distinct_2": distinct(bodies, 2),
        "repetition": float(np.mean([repetition(body) for body in bodies])),
    }


def real_form(rows: Sequence[Rendered]) -> dict[str, float]:
    """What the policy's `end_rate` and `repetition` become if it responds like the real responses."""
    ends = [row.real_finish == "stop" for row in rows]
    bodies = [row.real_ids[:-1] if is_end else row.real_ids for row, is_end in zip(rows, ends, strict=True)]
    return {
        "real_end_rate": float(np.mean(ends)),
        "real_repetition": float(np.mean([repetition(body) for body in bodies])),
    }


def ngrams(tokens: TokenIds, n: int) -> list[tuple[int, ...]]:
    ids = tokens.tolist()
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def distinct(bodies: Sequence[TokenIds], n: int) -> float:
    """Distinct n-grams over all n-grams, of all responses together; 1 without any."""
    counts = Counter(gram for body in bodies for gram in ngrams(body, n))
    return len(counts) / counts.total() if counts else 1.0


def repetition(body: TokenIds, n: int = 4) -> float:
    """The fraction of a response's 4-grams that occurred earlier in it."""
    grams = ngrams(body, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
