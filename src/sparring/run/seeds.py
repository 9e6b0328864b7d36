"""Randomness as a function of coordinates. There is no generator whose state would have to be saved."""

from __future__ import annotations

import json

import numpy as np
import xxhash
from jaxtyping import Float, Int


def seed_of(*coordinates: str | int) -> int:
    """A 64-bit seed for a place such as (run seed, "sample", iteration, row id, sample)."""
    return xxhash.xxh3_64_intdigest(json.dumps(coordinates).encode())


def permutation(count: int, seed: int) -> Int[np.ndarray, " count"]:
    return np.random.Generator(np.random.Philox(key=seed)).permutation(count)


def uniforms(count: int, seed: int) -> Float[np.ndarray, " count"]:
    """Uniform numbers in [0, 1), float64."""
    return np.random.Generator(np.random.Philox(key=seed)).random(count)
